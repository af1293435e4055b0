"""A convolution adapter's gradients from one read of x: ``da``, and ``dx += mask ∘ convᵀ(ds, a) / keep``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastpeft import dispatch
from fastpeft.ops import _checks, _library
from fastpeft.ops._geometry import rows_of
from fastpeft.ops.conv_shrink import operands


def _fake(
    x: torch.Tensor,
    ds: torch.Tensor,
    a: torch.Tensor,
    dx: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    p: float,
    seed: torch.Tensor | None,
    need_dx: bool,
    need_da: bool,
    backend: str,
) -> torch.Tensor:
    return a.new_empty(a.shape if need_da else 0)


def _describe(
    x: torch.Tensor,
    ds: torch.Tensor,
    a: torch.Tensor,
    dx: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    p: float,
    seed: object,
    need_dx: bool,
    need_da: bool,
) -> _library.Call:
    M, (R, *kernel), outputs = ds.shape[0], a.shape, need_dx + need_da
    K = torch.Size(kernel).numel()
    flop, elements = 2 * M * groups * K * R * outputs, x.numel() * (2 * need_dx + need_da)
    return _library.described("conv_grad_a", ds, flop=flop, elements=elements, p=p, M=M, K=K, groups=groups, rank=R)


_library.register("conv_grad_a", _fake, mutates=("dx",), describe=_describe)


def conv_grad_a(
    x: torch.Tensor,
    ds: torch.Tensor,
    a: torch.Tensor,
    dx: torch.Tensor | None = None,
    p: float = 0.0,
    seed: torch.Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    need_da: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """The gradients of conv_shrink: that for a is returned, that for x added in place; no autograd.

    x      [N, C, *in]  fp32 | bf16 | fp16, 4-D or 5-D; only its shape is read where need_da is False
    ds     [N · out, groups · R]  dtype of x
    a      [R, C / groups, *kernel]  any float dtype, any strides
    dx     like x, contiguous in torch's channels-last format: what is added to, or None
    p, seed, stride, padding, dilation    as in conv_shrink
    Returns    da in a.dtype and shape, or [0]
    Cost       2 · N · out · C · taps · R FLOP each; reads x once from memory, reads and writes dx once
    Raises     ValueError: shape, p or backend.  TypeError: dtype.
    """
    op = "conv_grad_a"
    geometry = operands(op, x, a, stride, padding, dilation, groups)
    _checks.matrix(op, "ds", ds, (rows_of(x, a, geometry), groups * a.shape[0]), "[N · out, groups · R]")
    _checks.require_dtype(ds.dtype == x.dtype, op, "ds", f"have the dtype of x, {x.dtype}", ds.dtype)
    if dx is not None:
        _checks.dense(op, "dx", dx)
        _checks.require(dx.shape == x.shape, op, "dx", f"have the shape of x, {list(x.shape)}", list(dx.shape))
        _checks.require_dtype(dx.dtype == x.dtype, op, "dx", f"have the dtype of x, {x.dtype}", dx.dtype)
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        fits = dx.is_contiguous(memory_format=last)
        _checks.require(fits, op, "dx", "be contiguous in channels-last format", f"strides {dx.stride()}")
    _checks.same_device(op, x.device, ds=ds, dx=dx)
    _checks.probability(op, "p", p)
    _checks.seed(op, seed, p)
    chosen = dispatch.select(op, backend, x.device.type, x.dtype)
    target = x.new_empty(0) if dx is None else dx
    return _library.call(
        op, chosen, x, ds.contiguous(), a, target, *geometry, p, seed if p else None, dx is not None, need_da
    )
