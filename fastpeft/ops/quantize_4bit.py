"""Quantise a weight to 4 bits, blockwise NF4 or FP4, and its absmax to 8 bits: the same bytes as bitsandbytes."""

from __future__ import annotations

import struct
from functools import cache

import torch

from fastpeft import dispatch
from fastpeft.ops import _checks, _library
from fastpeft.ops.weight4bit import BLOCK_SIZES, NESTED_BLOCK, QUANT_TYPES, Weight4bit, blocks_of

_OP = "quantize_4bit"


def _fake(w: torch.Tensor, quant_type: str, block_size: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    n = w.numel()
    return (
        w.new_empty((n + 1) // 2, dtype=torch.uint8),
        w.new_empty((n + block_size - 1) // block_size, dtype=torch.float32),
    )


def _fake_absmax(values: torch.Tensor, code: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    n = values.numel()
    return values.new_empty(n, dtype=torch.uint8), values.new_empty((n + NESTED_BLOCK - 1) // NESTED_BLOCK)


def _describe(w: torch.Tensor, quant_type: str, block_size: int) -> _library.Call:
    return _library.described(
        _OP, w, flop=0, elements=w.numel(), strategy=blocks_of(quant_type, block_size), size=w.numel()
    )


_library.register(_OP, _fake, describe=_describe)
_library.register("quantize_absmax", _fake_absmax, flops=lambda *_: 0)


def _fp32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@cache
def _dynamic_map() -> tuple[float, ...]:
    """The 256 values of the signed 8-bit dynamic type, ascending          Dettmers et al. 2021, arXiv:2110.02861, § 1.3

    ±10^(i-6) times the midpoints of 2^i equal steps of [0.1, 1], for i = 0 … 6, and 0 and 1. The steps are rounded as
    torch.linspace rounds them, so that the bits are those of bitsandbytes' table.
    """
    values = [0.0, 1.0]
    for i in range(7):
        steps = 2**i
        low, step = _fp32(0.1), _fp32((1 - _fp32(0.1)) / steps)
        edges = [_fp32(low + step * j if 2 * j < steps else 1 - step * (steps - j)) for j in range(steps + 1)]
        for j in range(steps):
            value = _fp32(_fp32(edges[j] + edges[j + 1]) / 2 * _fp32(10.0 ** (i - 6)))
            values += [value, -value]
    return tuple(sorted(values))


def _check(w: torch.Tensor, quant_type: str, block_size: int) -> None:
    _checks.dense(_OP, "w", w)
    _checks.floats(_OP, "w", w.dtype)
    _checks.require(w.numel() >= 1, _OP, "w", "have at least one element", list(w.shape))
    _checks.one_of(_OP, "quant_type", quant_type, QUANT_TYPES)
    _checks.size_of(_OP, "block_size", block_size, BLOCK_SIZES)


@torch.no_grad()
def quantize_4bit(
    w: torch.Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    backend: str | None = None,
) -> Weight4bit:
    """The 4-bit weight nearest to w                                       Dettmers et al. 2023, arXiv:2305.14314, § 3

    w             any shape and strides, at least one element, finite; fp32 | bf16 | fp16, and fp64 through fp32
    quant_type    "nf4" | "fp4"
    block_size    32 | 64 | ... | 4096 consecutive elements, in row-major order, share an absmax
    double_quant  store absmax in 8 bits: 4.127 bits an element instead of 4.5 at block_size 64
    backend       "cpp" | "triton" | "eager", or None for the first that serves
    Returns       Weight4bit; no autograd. The bytes are those of bitsandbytes 0.50 on a CPU.
    Cost          reads w once, writes n/2 + 4 n/block_size bytes
    Raises        ValueError: range, a value that is not finite, absmax whose sum is not.  TypeError: dtype.
    """
    _check(w, quant_type, block_size)
    shape, dtype = w.shape, w.dtype
    w = w.contiguous()
    if dtype == torch.float64:
        w, dtype = w.float(), torch.float32
    chosen = dispatch.select(_OP, backend, w.device.type, w.dtype)
    packed, absmax = _library.call(_OP, chosen, w, quant_type, block_size)
    # One inf or nan value makes its block's absmax so, and then the mean: w itself need not be read again.
    offset = absmax.mean() if double_quant else None
    if not w.is_meta and not bool((absmax if offset is None else offset).isfinite().all()):
        _checks.require(bool(absmax.isfinite().all()), _OP, "w", "be finite", "inf or nan")
        rule = "have blocks whose absmax have a finite sum in fp32, for double_quant"
        _checks.require(False, _OP, "w", rule, "inf")
    scales = [absmax]
    if offset is not None:
        code = torch.tensor(_dynamic_map(), dtype=torch.float32, device=w.device)
        chosen = dispatch.select("quantize_absmax", backend, w.device.type, torch.float32, _OP)
        codes, scale = _library.launch("quantize_absmax", chosen, absmax - offset, code)
        scales = [codes, code, scale, offset]
    return Weight4bit(packed, scales, shape, dtype, quant_type, block_size)
