"""``s = conv(drop(x), a)``: the projection to rank space of a convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastpeft import dispatch
from fastpeft.ops import _checks, _library
from fastpeft.ops._geometry import Geometry, out_sizes, per_dimension, rows_of


def _fake(
    x: torch.Tensor,
    a: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    p: float,
    seed: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    return x.new_empty(rows_of(x, a, Geometry(stride, padding, dilation, groups)), groups * a.shape[0])


def _describe(
    x: torch.Tensor,
    a: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    p: float,
    seed: torch.Tensor | None,
) -> _library.Call:
    M, K, R = rows_of(x, a, Geometry(stride, padding, dilation, groups)), a.shape[1:].numel(), a.shape[0]
    flop = 2 * M * groups * K * R
    return _library.described("conv_shrink", x, flop=flop, elements=x.numel(), p=p, M=M, K=K, groups=groups, rank=R)


_library.register("conv_shrink", _fake, describe=_describe)


def operands(
    op: str, x: torch.Tensor, a: torch.Tensor, stride: object, padding: object, dilation: object, groups: int
) -> Geometry:
    """Check the operands that conv_shrink and its gradients share."""
    _checks.activation(op, x)
    D = x.dim() - 2
    _checks.require(D in (2, 3), op, "x", "have shape [N, C, *in] of 4 or 5 dimensions", list(x.shape))
    _checks.dense(op, "a", a)
    _checks.require_dtype(a.is_floating_point(), op, "a", "be a floating point tensor", a.dtype)
    _checks.require_dtype(isinstance(groups, int), op, "groups", "be an int", repr(groups))
    C = x.shape[1]
    _checks.require(groups >= 1 and C % groups == 0, op, "groups", f"divide the {C} channels of x", groups)
    want = f"have shape [R, C / groups, *kernel] = [any, {C // groups}, any × {D}]"
    _checks.require(a.dim() == D + 2 and a.shape[1] == C // groups, op, "a", want, list(a.shape))
    _checks.same_device(op, x.device, a=a)
    geometry = Geometry(
        per_dimension(op, "stride", stride, D, 1),
        per_dimension(op, "padding", padding, D, 0),
        per_dimension(op, "dilation", dilation, D, 1),
        groups,
    )
    sizes = out_sizes(x.shape[2:], a.shape[2:], geometry)
    kernel = list(a.shape[2:])
    _checks.require(all(n >= 1 for n in sizes), op, "x", f"hold a window of the kernel {kernel}", list(x.shape[2:]))
    return geometry


def conv_shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    p: float = 0.0,
    seed: torch.Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str | None = None,
) -> torch.Tensor:
    """``s = conv(drop(x), a)``, the projection to rank space of a convolution; no autograd.

    x      [N, C, *in]  fp32 | bf16 | fp16, 4-D or 5-D; channels-last is read as it lies, anything else copied once
    a      [R, C / groups, *kernel]  any float dtype, any strides; all groups of channels share a
    p, seed    as in lora_shrink; position n, *in of x is the mask's row, the channel its column
    stride, padding, dilation    an int, or one for each dimension
    Returns    s [N · out, groups · R] in x.dtype, summed in fp32: a row for each position of the output
    Cost       2 · N · out · C · taps · R FLOP; reads x once from memory, its windows never written
    Raises     ValueError: shape, p or backend.  TypeError: dtype.
    """
    op = "conv_shrink"
    geometry = operands(op, x, a, stride, padding, dilation, groups)
    _checks.probability(op, "p", p)
    _checks.seed(op, seed, p)
    chosen = dispatch.select(op, backend, x.device.type, x.dtype)
    return _library.call(op, chosen, x, a, *geometry, p, seed if p else None)
