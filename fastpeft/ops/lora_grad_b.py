"""``ds = scale · dy b``, ``db = scale · dyᵀ s`` and the bias gradient, in one read of dy."""

from __future__ import annotations

import torch

from fastpeft import dispatch
from fastpeft.ops import _checks, _library

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _fake(
    dy: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    need_db: bool,
    need_bias: bool,
    mask: torch.Tensor | None,
    backend: str,
) -> Triple:
    return (
        dy.new_empty(dy.shape[0], b.shape[1]),
        b.new_empty(b.shape) if need_db else b.new_empty(0),
        dy.new_empty(dy.shape[1] if need_bias else 0, dtype=torch.promote_types(dy.dtype, torch.float32)),
    )


def _describe(
    dy: torch.Tensor, s: torch.Tensor, b: torch.Tensor, scale: float, need_db: bool, need_bias: bool, mask: object
) -> _library.Call:
    (M, N), R = dy.shape, b.shape[1]
    return _library.described("lora_grad_b", dy, flop=2 * M * N * R * (1 + need_db), elements=M * N, M=M, N=N, rank=R)


_library.register("lora_grad_b", _fake, describe=_describe)


def lora_grad_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float = 1.0,
    need_db: bool = True,
    need_bias: bool = False,
    mask: torch.Tensor | None = None,
    backend: str | None = None,
) -> Triple:
    """All gradients from one read of dy; no autograd.

    dy     [M, N]  fp32 | bf16 | fp16, last dim contiguous
    s      [M, R]  dtype of dy; not read where need_db is False
    b      [N, R]  any float dtype, any strides
    mask   [R, ceil(N / 8)]  uint8, one bit per element of dbᵀ, lowest first: db is zero where its bit is; or None
    Returns    ds = scale · dy b [M, R] in dy.dtype · db = scale · dyᵀ s [N, R] in b.dtype · Σₘ dy [N] fp32;
               an output not asked for has shape [0]
    Cost       2MNR FLOP each for ds and db; reads dy once
    Raises     ValueError: shape or backend.  TypeError: dtype.
    """
    op = "lora_grad_b"
    _checks.matrix(op, "dy", dy, (None, None), "[M, N]")
    _checks.matrix(op, "b", b, (dy.shape[1], None), "[N, R]")
    _checks.matrix(op, "s", s, (dy.shape[0], b.shape[1]), "[M, R]")
    _checks.require_dtype(s.dtype == dy.dtype, op, "s", f"have the dtype of dy, {dy.dtype}", s.dtype)
    _checks.bits(op, "mask", mask, b.shape[1], b.shape[0])
    _checks.same_device(op, dy.device, s=s, b=b, mask=mask)
    chosen = dispatch.select(op, backend, dy.device.type, dy.dtype)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    return _library.call(op, chosen, dy, s.contiguous(), b, scale, need_db, need_bias, mask)
