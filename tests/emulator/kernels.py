"""The launchers of csrc/cuda/launchers.h on torch tensors of the CPU, run by the emulator."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from emulator import build

SOURCES = sorted(build.CSRC.rglob("*.cu"))
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCHEDULES = {"forward": (0, 0), "reverse": (1, 0), "random": (2, 1)}


class _Weight(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("packed", "absmax", "codes", "code", "scale", "offset")]
    _fields_ += [("quant_type", ctypes.c_int32), ("block_size", ctypes.c_int32)]


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("type", ctypes.c_int32)]


def _matrix(tensor):
    if tensor is None:
        return None
    stride = tensor.stride(0) if tensor.dim() == 2 else tensor.numel()
    return ctypes.byref(_Matrix(tensor.data_ptr(), stride, TYPES[tensor.dtype]))


def _weight(q):
    parts = [tensor.data_ptr() for tensor in q.scales]
    scales = [None, *parts] if q.double_quant else [*parts, None, None, None, None]
    return ctypes.byref(_Weight(q.packed.data_ptr(), *scales, int(q.quant_type == "fp4"), q.block_size))


def _scratch(spans, rows, columns):
    return torch.full((spans * rows * columns,), torch.nan) if spans > 1 else None


def _pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


class Kernels:
    """One build of every .cu file; FASTPEFT_SANITIZE picks the sanitizer, whose library LD_PRELOAD must name."""

    def __init__(self, out: Path):
        self.sanitizer = os.environ.get("FASTPEFT_SANITIZE", "")
        self.library = ctypes.CDLL(str(build.build(SOURCES, out, "kernels.so", self.sanitizer)))
        self.library.emu_message.restype = ctypes.c_char_p
        self.library.emu_stop_counting.restype = ctypes.c_int64
        self.library.fp_linear4bit_small_dx_spans.restype = ctypes.c_int64
        self.library.fp_linear4bit_mid_spans.restype = ctypes.c_int64

    def schedule(self, name):
        order, seed = SCHEDULES[name]
        self.library.emu_schedule(order, ctypes.c_uint64(seed))

    def dequantize_4bit(self, q, out):
        """The launcher's cudaError_t."""
        N, K = out.shape if out.dim() == 2 else (1, out.numel())
        return self.library.fp_dequantize_4bit(_weight(q), _matrix(out), ctypes.c_int64(N), ctypes.c_int64(K), None)

    def linear4bit_small(self, x, q, y, s=None, b=None, bias=None, scale=1.0, accumulate=False):
        """The launcher's cudaError_t."""
        sizes = (x.shape[0], y.shape[1], x.shape[1], 0 if s is None else s.shape[1])
        return self.library.fp_linear4bit_small(
            _weight(q), *(_matrix(tensor) for tensor in (x, y, s, b, bias)), ctypes.c_float(scale), int(accumulate),
            *(ctypes.c_int64(size) for size in sizes), None,
        )  # fmt: skip

    def spans(self, kernel, M, N, K):
        """How many `kernel` ("small_dx" or "mid") asks for."""
        ask = getattr(self.library, f"fp_linear4bit_{kernel}_spans")
        return ask(*(ctypes.c_int64(size) for size in (M, N, K)))

    def linear4bit_small_dx(self, dy, q, dx, accumulate=False, spans=None):
        """The launcher's cudaError_t; as many spans as it asks for."""
        M, N, K = *dy.shape, dx.shape[1]
        spans = spans or self.spans("small_dx", M, N, K)
        scratch = _scratch(spans, M, K)
        return self.library.fp_linear4bit_small_dx(
            _weight(q), _matrix(dy), _matrix(dx), int(accumulate), *(ctypes.c_int64(size) for size in (M, N, K)),
            _pointer(scratch), ctypes.c_int64(spans), None,
        )  # fmt: skip

    def linear4bit_mid(self, x, q, y, s=None, b=None, bias=None, scale=1.0, accumulate=False, spans=None):
        """The launcher's cudaError_t; as many spans as it asks for."""
        M, N, K = x.shape[0], y.shape[1], x.shape[1]
        spans = spans or self.spans("mid", M, N, K)
        scratch = _scratch(spans, M, N)
        return self.library.fp_linear4bit_mid(
            _weight(q), *(_matrix(tensor) for tensor in (x, y, s, b, bias)), ctypes.c_float(scale), int(accumulate),
            *(ctypes.c_int64(size) for size in (M, N, K, 0 if s is None else s.shape[1])), _pointer(scratch),
            ctypes.c_int64(spans), None,
        )  # fmt: skip

    def message(self):
        return self.library.emu_message().decode()

    def moved(self, call):
        """Bytes of global memory that `call` moved: what cannot stay in a cache each time, the rest once."""
        self.library.emu_start_counting()
        assert call() == 0, self.message()
        return self.library.emu_stop_counting()
