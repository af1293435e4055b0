"""The windows of a convolution as rows, the unfold formula for any number of dimensions, and its adjoint."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastpeft.reference.dropout import dropped


def taps(kernel: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The positions of a kernel in the order of its memory."""
    return [(i, *rest) for i in range(kernel[0]) for rest in taps(kernel[1:])] if kernel else [()]


def _padded(x: torch.Tensor, padding: list[int]) -> torch.Tensor:
    return F.pad(x, [side for one in reversed(padding) for side in (one, one)]) if any(padding) else x


def windows(
    x: torch.Tensor, kernel: tuple[int, ...], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> torch.Tensor:
    """x [N, C, *in] -> [M, groups, C / groups · taps], M = N · out: the channel is the outer index of a column."""
    view = _padded(x, padding)
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        view = view.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]  # [N, C, *out, *kernel]
    D = len(kernel)
    view = view.permute(0, *range(2, 2 + D), 1, *range(2 + D, 2 + 2 * D))
    rows, width = view.shape[: 1 + D].numel(), view.shape[1 + D :].numel() // groups
    return view.reshape(rows, groups, width)


def from_windows(
    like: torch.Tensor,
    columns: torch.Tensor,
    kernel: tuple[int, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    """The adjoint of ``windows``: columns [M, groups, C / groups · taps] summed into a tensor of ``like``'s shape."""
    wide = _padded(torch.zeros_like(like), padding)
    at = [range(0, d * (k - 1) + 1, d) for k, d in zip(kernel, dilation, strict=True)]
    out = [(n - r[-1] - 1) // s + 1 for n, r, s in zip(wide.shape[2:], at, stride, strict=True)]
    parts = columns.reshape(like.shape[0], *out, like.shape[1], len(taps(kernel))).movedim(-2, 1)  # [N, C, *out, taps]
    for t, tap in enumerate(taps(kernel)):
        # The positions that this tap reads, one for each output position.
        there = [slice(r[i], r[i] + s * (n - 1) + 1, s) for i, r, n, s in zip(tap, at, out, stride, strict=True)]
        wide[(slice(None), slice(None), *there)] += parts[..., t]
    inside = [slice(p, p + n) for p, n in zip(padding, like.shape[2:], strict=True)]
    return wide[(slice(None), slice(None), *inside)]


def dropped_channels(x: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """``dropped`` of an activation [N, C, *in]: position n, *in is the mask's row, the channel its column."""
    if seed is None:
        return x
    rows = x.movedim(1, -1)
    return dropped(rows.reshape(-1, x.shape[1]), p, seed).view(rows.shape).movedim(-1, 1)
