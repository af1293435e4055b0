"""``y = bias + scale · (s bᵀ + lora_bias)`` as a new y, or ``y += scale · s bᵀ`` in place."""

from __future__ import annotations

import torch

from fastpeft import dispatch
from fastpeft.ops import _checks, _library


def _fake(
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scale: float,
    backend: str,
) -> torch.Tensor:
    return s.new_empty(s.shape[0], b.shape[0])


def _fake_add(y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, scale: float, backend: str) -> None:
    return None


def _describe(s: torch.Tensor, b: torch.Tensor, *_: object) -> _library.Call:
    (M, R), N = s.shape, b.shape[0]
    return _library.described("lora_expand", s, flop=2 * M * N * R, elements=M * N, M=M, N=N, rank=R)


def _describe_add(y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, scale: float) -> _library.Call:
    (M, N), R = y.shape, s.shape[1]
    return _library.described("lora_expand_add", y, flop=2 * M * N * R, elements=2 * M * N, M=M, N=N, rank=R)


_library.register("lora_expand", _fake, describe=_describe)
_library.register("lora_expand_add", _fake_add, mutates=("y",), describe=_describe_add)


def lora_expand(
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """``y = bias + scale · (s bᵀ + lora_bias)``, the projection back from rank space; no autograd.

    s          [M, R]  fp32 | bf16 | fp16, last dim contiguous
    b          [N, R]  any float dtype, any strides
    bias, lora_bias    [N]  any float dtype, or None
    scale      float, dimensionless
    Returns    y [M, N] in s.dtype, summed in fp32
    Cost       2MNR FLOP; writes y once
    Raises     ValueError: shape or backend.  TypeError: dtype.
    """
    op = "lora_expand"
    _operands(op, s, b)
    _checks.vector(op, "bias", bias, b.shape[0], "N")
    _checks.vector(op, "lora_bias", lora_bias, b.shape[0], "N")
    _checks.same_device(op, s.device, bias=bias, lora_bias=lora_bias)
    chosen = dispatch.select(op, backend, s.device.type, s.dtype)
    return _library.call(op, chosen, s.contiguous(), b, bias, lora_bias, scale)


def lora_expand_add(
    y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, *, scale: float = 1.0, backend: str | None = None
) -> torch.Tensor:
    """``y += scale · s bᵀ`` in place, after any base op; y [M, N] contiguous in s.dtype, returned; no autograd.

    s, b, scale    as in lora_expand
    Cost       2MNR FLOP; reads and writes y once
    Raises     ValueError: shape, strides of y, or backend.  TypeError: dtype.
    """
    op = "lora_expand_add"
    _operands(op, s, b)
    _checks.matrix(op, "y", y, (s.shape[0], b.shape[0]), "[M, N]")
    _checks.require(y.is_contiguous(), op, "y", "be contiguous", f"strides {y.stride()}")
    _checks.require_dtype(y.dtype == s.dtype, op, "y", f"have the dtype of s, {s.dtype}", y.dtype)
    _checks.same_device(op, s.device, y=y)
    chosen = dispatch.select(op, backend, s.device.type, s.dtype)
    _library.call(op, chosen, y, s.contiguous(), b, scale)
    return y


def _operands(op: str, s: torch.Tensor, b: torch.Tensor) -> None:
    _checks.matrix(op, "s", s, (None, None), "[M, R]")
    _checks.matrix(op, "b", b, (None, s.shape[1]), "[N, R]")
    _checks.same_device(op, s.device, b=b)
