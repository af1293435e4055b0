"""A 4-bit weight back to floats."""

from __future__ import annotations

import torch

from fastpeft import dispatch
from fastpeft.ops import _checks, _library
from fastpeft.ops.weight4bit import Weight4bit, blocks_of

_OP = "dequantize_4bit"


def _fake(
    packed: torch.Tensor, scales: list[torch.Tensor], quant_type: str, block_size: int, out: torch.Tensor, backend: str
) -> None:
    return None


def _describe(
    packed: torch.Tensor, scales: list[torch.Tensor], quant_type: str, block_size: int, out: torch.Tensor
) -> _library.Call:
    blocks = blocks_of(quant_type, block_size, len(scales) == 4)
    return _library.described(_OP, out, flop=0, elements=out.numel(), strategy=blocks, size=out.numel())


_library.register(_OP, _fake, mutates=("out",), describe=_describe)


def _check_out(q: Weight4bit, dtype: torch.dtype | None, out: torch.Tensor) -> None:
    _checks.dense(_OP, "out", out)
    _checks.require(out.shape == q.shape, _OP, "out", f"have shape {list(q.shape)}", list(out.shape))
    _checks.require_dtype(dtype in (None, out.dtype), _OP, "out", f"have dtype {dtype}", out.dtype)
    _checks.require(out.device == q.device, _OP, "out", f"be on the device of q, {q.device}", out.device)
    _checks.require(out.is_contiguous(), _OP, "out", "be contiguous", f"strides {out.stride()}")
    _checks.require(not out.requires_grad, _OP, "out", "not require a gradient", "requires_grad=True")


def dequantize_4bit(
    q: Weight4bit, dtype: torch.dtype | None = None, *, out: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """w = code[nibble] · absmax[block]                                    Dettmers et al. 2023, arXiv:2305.14314, eq. 2

    q        Weight4bit
    dtype    fp32 | bf16 | fp16 (fp64 with the eager backend); default: that of ``out``, else of the quantised weight
    out      written and returned where given: shape of q, contiguous
    backend  "cpp" | "cuda" | "triton" | "eager", or None for the first that serves
    Returns    w in the shape of q, the product of fp32 rounded once; no autograd
    Cost     reads n/2 bytes and the scales, writes w
    Raises   ValueError: shape, device, strides or backend.  TypeError: dtype.
    """
    _checks.require_dtype(isinstance(q, Weight4bit), _OP, "q", "be a Weight4bit", type(q).__name__)
    q.check(_OP, "q")
    if out is None:
        dtype = dtype or q.dtype
        _checks.floats(_OP, "dtype", dtype)
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
    else:
        _check_out(q, dtype, out)
        _checks.floats(_OP, "out", out.dtype)
    chosen = dispatch.select(_OP, backend, out.device.type, out.dtype)
    _library.call(_OP, chosen, q.packed, q.scales, q.quant_type, q.block_size, out)
    return out
