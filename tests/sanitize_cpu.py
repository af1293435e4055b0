"""Build the C++ extension with AddressSanitizer and UBSan, and run the tests of its CPU kernels under them.

    python tests/sanitize_cpu.py [pytest arguments]

Works on a copy in a temporary folder; needs g++ with its sanitizer libraries.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The tile registers as arrays: what they read and write is checked too, and on any processor with AVX-512-BF16.
TILES = f"-DFP_EMULATED_TILES -I{ROOT / 'tests' / 'emulator'}"
FLAGS = f"-g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer {TILES}"
TESTS = [
    "tests/device/test_fourbit_cpu.py",
    "tests/device/test_isa.py",
    "tests/ops/test_lora_linear.py::test_more_rows_than_a_mask_has_room_for",
    "tests/ops/test_lora_between.py",
    "tests/nn/test_nn_sparse.py::test_kernels_mask_what_they_write",
    "tests/ops/test_conv_shrink.py",
    "tests/ops/test_conv_grad_a.py",
    # Neither the interpreter of Triton nor what torch.compile builds is ours to check.
    *("-k", "not triton and not compile"),
]


def library(name: str) -> str:
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        for name in ("csrc", "fastpeft", "kernels", "tests"):
            shutil.copytree(ROOT / name, site / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        for name in ("setup.py", "setup_commands.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, site)
        built = {
            **os.environ,
            "CC": "gcc",
            "CXX": "g++",
            "CFLAGS": FLAGS,
            "LDFLAGS": FLAGS,
            "FASTPEFT_CPP": "1",
            "FASTPEFT_CUDA": "0",
        }
        subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=site, env=built, check=True
        )
        # Loaded before Python, which is not built with it; libstdc++ too, or the interceptor of `throw` finds nothing.
        preload = f"{library('libasan.so')} {library('libstdc++.so.6')}"
        path = os.pathsep.join([folder, f"{folder}/tests", f"{folder}/tests/support"])  # no pyproject.toml gives it
        run = {**os.environ, "PYTHONPATH": path, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
        # -s: pytest would swallow the report.
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-s",
            "-p",
            "no:cacheprovider",
            "-c",
            os.devnull,
            "--rootdir",
            folder,
        ]
        return subprocess.run([*command, *TESTS, *sys.argv[1:]], cwd=site, env=run).returncode


if __name__ == "__main__":
    sys.exit(main())
