"""Operands that the tests of the 4-bit Triton launchers share."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend is not installed")

from fastpeft.kernels import _common
from fastpeft.reference import dequantize_4bit as eager_dequantize
from fastpeft.reference import quantize_4bit as eager_quantize

MARKS = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where a test divides by zero on purpose
    pytest.mark.skipif(
        "Interpreted" not in type(_common._reduce_splits_kernel).__name__,
        reason="TRITON_INTERPRET=1 was not set when triton was imported",
    ),
]

NF4_64 = ("nf4", 64)
# An 8-bit code of 256 ascending values; the real one is bitsandbytes' and comes with the weight.
CODE = torch.cat([-torch.logspace(-6, 0, 127).flip(0), torch.zeros(1), torch.logspace(-6, 0, 128)])


def scales_of(absmax, double):
    if not double:
        return [absmax]
    offset = absmax.mean()
    codes, scale = eager_quantize.quantize_absmax(absmax - offset, CODE)
    return [codes, CODE, scale, offset]


def weight(N, K, quant_type="nf4", block_size=64, double=True, dtype=torch.float32):
    """(packed, scales, quant_type, block_size) of a random weight, and the weight they stand for, in `dtype`."""
    packed, absmax = eager_quantize.quantize_4bit(torch.randn(N, K), quant_type, block_size)
    scales = scales_of(absmax, double)
    return (packed, scales, quant_type, block_size), dequantized(packed, scales, quant_type, block_size, N, K, dtype)


def dequantized(packed, scales, quant_type, block_size, N, K, dtype):
    w = torch.empty(N, K, dtype=dtype)
    eager_dequantize.dequantize_4bit(packed, scales, quant_type, block_size, w)
    return w


class Case:
    """Operands; no strides are the usual ones: x and dy are wider, a, b and the biases parts of other fp32 tensors."""

    def __init__(self, M, N, K, R, dtype, p=0.0, format=(*NF4_64, True), lora_bias=True):
        self.packed, self.w = weight(N, K, *format, dtype=dtype)
        self.x = torch.randn(M, K + 8).to(dtype)[:, :K]
        self.dy = torch.randn(M, N + 8).to(dtype)[:, :N]
        self.a = (torch.randn(K, R) / K**0.5).t() if R else None
        self.b = (torch.randn(R, N) / R**0.5).t() if R else None
        self.bias = torch.randn(N, 2).to(dtype)[:, 0]
        self.lora_bias = torch.randn(N, 3)[:, 1] if R and lora_bias else None
        self.s = torch.randn(M, R).to(dtype) if R else self.x.new_empty(0)
        self.p, self.seed, self.dtype = p, torch.tensor([2**40 + 7]) if p else None, dtype

    def wide(self, *names):
        """Operands in fp64 after the roundings that every backend makes."""
        values = (getattr(self, name) for name in names)
        return [None if v is None else v.to(self.dtype).double() for v in values]
