"""What the tests of the emulated CUDA kernels share: guarded memory, and runs of them under a sanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emulator import build

GUARD = 32
INVALID = 1  # cudaErrorInvalidValue
HALF = [torch.bfloat16, torch.float16]
SANITIZED = os.environ.get("FASTPEFT_SANITIZE", "")
counts_bytes = pytest.mark.skipif(bool(SANITIZED), reason="the count allocates inside a thread")


class Guarded:
    """A matrix of NaN between guards of NaN, `offset` elements past an aligned address."""

    def __init__(self, rows, columns, dtype, stride=None, offset=0):
        self.memory = torch.full((2 * GUARD + offset + rows * (stride or columns),), torch.nan, dtype=dtype)
        self.value = self.memory[GUARD + offset :].as_strided((rows, columns), (stride or columns, 1))

    def only_written_inside(self):
        inside = self.value.clone()
        self.value.fill_(torch.nan)
        around = self.memory.isnan().all().item()
        self.value.copy_(inside)
        return around and not inside.isnan().any().item()


def shifted(matrix, offset, stride=None):
    """`matrix` with rows `stride` apart, `offset` elements past an aligned address."""
    copy = Guarded(*matrix.shape, matrix.dtype, stride, offset)
    copy.value.copy_(matrix)
    return copy.value


def exact_weight(N, K, dtype=torch.bfloat16):
    """Weights of -1, 0 and 1 times powers of two: products and sums of small integers with them are exact."""
    from fastpeft.ops import Weight4bit

    nibbles = torch.tensor([0, 7, 15])[torch.randint(3, (N, K))]
    packed = (nibbles.view(-1, 2)[:, 0] * 16 + nibbles.view(-1, 2)[:, 1]).to(torch.uint8)
    absmax = 2.0 ** torch.randint(-1, 2, (-(-N * K // 64),))
    return Weight4bit(packed, [absmax], torch.Size((N, K)), dtype, "nf4", 64)


def run_sanitized(sanitizer, selection):
    """Every test of the emulator that `selection` picks, in a process whose every access is watched."""
    names = {"thread": ["libtsan.so"], "address": ["libasan.so", "libstdc++.so.6"]}[sanitizer]
    found = [
        subprocess.check_output([build.compiler(), f"-print-file-name={name}"], text=True).strip() for name in names
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(found), "FASTPEFT_SANITIZE": sanitizer,
        "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66:report_signal_unsafe=0",
    }  # fmt: skip
    files = sorted((Path(__file__).parents[1] / "device").glob("test_cuda_emulator*.py"))
    command = [sys.executable, "-m", "pytest", "-qxs", "-p", "no:cacheprovider", *files, "-k", selection]
    return subprocess.run(command, capture_output=True, text=True, env=environment)
