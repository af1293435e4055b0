"""Stride, padding, dilation and groups of a convolution: from torch's spellings to lists of one int a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from fastpeft.ops import _checks

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class Geometry(NamedTuple):
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def out_sizes(sizes: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> list[int]:
    """Sizes of the output for an input of ``sizes``; below 1 where the kernel does not fit."""
    stride, padding, dilation, _ = geometry
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True)
    ]


def rows_of(x: torch.Tensor, a: torch.Tensor, geometry: Geometry) -> int:
    """N · out: the rows of the output for x [N, C, *in] and a kernel of a's shape [R, C / groups, *kernel]."""
    rows = x.shape[0]
    for n in out_sizes(x.shape[2:], a.shape[2:], geometry):
        rows = rows * n
    return rows


def per_dimension(op: str, argument: str, value: object, D: int, least: int) -> list[int]:
    """An int, or one for each of the D dimensions, as a list."""
    given: list[Any] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    _checks.require_dtype(
        all(isinstance(one, int) and not isinstance(one, bool) for one in given),
        op, argument, "be an int or a tuple of ints", repr(value),
    )  # fmt: skip
    _checks.require(len(given) in (1, D), op, argument, f"have one value or {D}", repr(value))
    _checks.require(min(given) >= least, op, argument, f"be at least {least}", repr(value))
    return given * (D // len(given))


def resolve(
    op: str,
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: object,
    padding: object,
    dilation: object,
    groups: int,
    padding_mode: str,
) -> tuple[torch.Tensor, Geometry]:
    """(x, geometry) with as many zeros before each dimension as after it; x itself if that suffices.

    Any other padding is added to x here, as torch's own layers do: other modes, and the odd zero of "same".
    """
    D = len(kernel)
    strides, dilations = per_dimension(op, "stride", stride, D, 1), per_dimension(op, "dilation", dilation, D, 1)
    _checks.one_of(op, "padding_mode", padding_mode, PADDING_MODES)
    if isinstance(padding, str):
        _checks.one_of(op, "padding", padding, ("valid", "same"))
        unit = padding == "valid" or all(s == 1 for s in strides)
        _checks.require(unit, op, "stride", 'be 1 where padding is "same"', repr(stride))
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilations, strict=True)]
    else:
        total = [2 * one for one in per_dimension(op, "padding", padding, D, 0)]
    before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    if padding_mode != "zeros":
        sides = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
        x = F.pad(x, sides, padding_mode) if any(total) else x
        before = [0] * D
    elif before != after:
        sides = [side for b, a in zip(reversed(before), reversed(after), strict=True) for side in (0, a - b)]
        x = F.pad(x, sides)
    geometry = Geometry(strides, before, dilations, groups)
    sizes = out_sizes(x.shape[2:], kernel, geometry)
    _checks.require(
        all(n >= 1 for n in sizes), op, "x", f"hold a window of the kernel {list(kernel)}", list(x.shape[2:])
    )
    return x, geometry
