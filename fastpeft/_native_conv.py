"""A convolution's thin products on the CPU, under the names of the dispatch table: the vendor's convolutions.

The vendor's convolutions have no dropout. So csrc writes the dropped x of a few images at a time, a piece that fits a
cache, and adds the masked share of dx piece by piece. Inside, everything is channels-last, where the vendor's thin
products take half the time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from fastpeft._native import NATIVE, dropout_rows

# Bytes of a piece of x or dx that is copied.
_PIECE = 4 << 20
_SLOW = {torch.float16: not NATIVE["float16"], torch.bfloat16: not NATIVE["bfloat16"]}


def _last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[N, C, *in] channels-last -> [N · in, C], a view."""
    return x.movedim(1, -1).view(-1, x.shape[1])


def _pieces(x: torch.Tensor, whole: bool) -> Iterator[slice]:
    """Ranges of images: all at once, or as many as a piece holds."""
    N = x.shape[0]
    step = N if whole else max(1, _PIECE // max(1, x[0].numel() * x.element_size()))
    return (slice(first, min(first + step, N)) for first in range(0, N, step))


def _operand(x: torch.Tensor, piece: slice, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """Images of x as the vendor multiplies them: masked, and in fp32 if that product is faster."""
    part = x[piece]
    if seed is not None:
        dropped = torch.empty_like(part)
        first = piece.start * part.shape[2:].numel()
        dropout_rows(_rows(part), p, seed, first, False, _rows(dropped))
        part = dropped
    return part.float() if _SLOW.get(x.dtype) else part


def _thin(a: torch.Tensor, groups: int, like: torch.Tensor) -> torch.Tensor:
    """a, repeated for every group of channels, as one weight."""
    a = a.to(torch.float32 if _SLOW.get(like.dtype) else like.dtype)
    return a if groups == 1 else a.repeat(groups, *[1] * (a.dim() - 1))


def conv_shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """As in reference/conv_shrink.py."""
    x, thin = _last(x), _thin(a, groups, x)
    conv = F.conv2d if x.dim() == 4 else F.conv3d
    whole = seed is None and not _SLOW.get(x.dtype)
    parts = []
    for piece in _pieces(x, whole) if x.shape[0] else (slice(0, 0),):
        parts.append(_rows(_last(conv(_operand(x, piece, p, seed), thin, None, stride, padding, dilation, groups))))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x.dtype)


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
    """As in reference/conv_grad_a.py; dx is channels-last."""
    like = dx if need_dx else x
    thin = _thin(a, groups, ds)
    da = torch.zeros(thin.shape) if need_da else a.new_empty(0)
    N, D = like.shape[0], like.dim() - 2
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(like.shape[2:], a.shape[2:], stride, padding, dilation, strict=True)
    ]
    ds = ds.view(N, *out, ds.shape[1]).movedim(-1, 1)

    def gradients(piece: slice, x: torch.Tensor, which: list[bool]) -> tuple[torch.Tensor, ...]:
        part = ds[piece].to(thin.dtype)
        return torch.ops.aten.convolution_backward(
            part, x, thin, None, stride, padding, dilation, False, [0] * D, groups, which
        )

    if need_da and N:
        x = _last(x)
        for piece in _pieces(x, seed is None and not _SLOW.get(x.dtype)):
            da += gradients(piece, _operand(x, piece, p, seed), [False, True, False])[1]
    if need_dx and N:
        for piece in _pieces(dx, False):
            # This product reads only the shape and the memory format of its x.
            share = _last(gradients(piece, dx[piece].to(thin.dtype), [True, False, False])[0]).to(dx.dtype)
            if seed is None:
                dx[piece] += share
            else:
                first = piece.start * dx.shape[2:].numel()
                dropout_rows(_rows(share), p, seed, first, True, _rows(dx[piece]))
    return da.view(groups, *a.shape).sum(0).to(a.dtype) if need_da else da
