"""What a GPU answers to every PTX wrapper of csrc/cuda/fp_cuda.h, for the emulator's twins to give too.

`make gpu` writes it to bench/results/ptx_twins.json; tests/device/test_cuda_emulator_twins.py reads it.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path

import torch

from emulator import build

SOURCE = build.HERE / "twins.cu"
FILE = build.HERE.parents[1] / "bench/results/ptx_twins.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WORDS = 800


def given(dtype: torch.dtype) -> torch.Tensor:
    """512 words int32: 1024 integers from -6 to 6, in no order that a wrong index keeps."""
    return ((torch.arange(1024) * 37 + torch.arange(1024) // 16) % 13 - 6).to(dtype).view(torch.int32)


def build_for_gpu(folder: Path, arch: int) -> Path:
    """The twins' source compiled by nvcc for sm_<arch>. FileNotFoundError without an nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc: not found on PATH")
    out = folder / "twins_gpu.so"
    build.run(
        [nvcc, "-std=c++17", f"-arch=sm_{arch}", "-shared", "-Xcompiler", "-fPIC", "-I", build.CSRC, SOURCE, "-o", out]
    )
    return out


def build_for_cpu(folder: Path, sanitizer: str = "") -> Path:
    return build.build([SOURCE], folder, "twins.so", sanitizer)


def answers(library: ctypes.CDLL, device: str) -> dict[str, list[int]]:
    """The words that each dtype's wrappers give on this device. RuntimeError where the launch fails."""
    out = {}
    for half, (name, dtype) in enumerate(DTYPES.items()):
        words = torch.full((WORDS,), -1, dtype=torch.int32, device=device)
        questions = given(dtype).to(device)
        code = library.twin_vectors(half, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (questions, words)))
        if code:
            raise RuntimeError(f"twins: the launch returned CUDA's error {code}")
        if device == "cuda":
            torch.cuda.synchronize()
        out[name] = words.tolist()
    return out


def read(path: Path = FILE) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None
