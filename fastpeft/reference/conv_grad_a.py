"""A convolution adapter's gradients from one read of x: da, and its share of dx added in place."""

from __future__ import annotations

import torch

from fastpeft.reference._windows import dropped_channels, from_windows, windows


def conv_grad_a(
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
) -> torch.Tensor:
    """x [N, C, *in], ds [N · out, groups · R], a [R, C / groups, *kernel], dx like x -> da in a.dtype, or [0]."""
    kernel, R = tuple(a.shape[2:]), a.shape[0]
    parts = ds.view(ds.shape[0], groups, R)
    if need_dx:
        columns = parts @ a.to(ds.dtype).flatten(1)
        share = from_windows(dx, columns, kernel, stride, padding, dilation)
        dx.add_(dropped_channels(share, p, seed))
    if not need_da:
        return a.new_empty(0)
    columns = windows(dropped_channels(x, p, seed), kernel, stride, padding, dilation, groups)
    return (parts.flatten(0, 1).t() @ columns.flatten(0, 1)).view(a.shape).to(a.dtype)
