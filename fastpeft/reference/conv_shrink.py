"""``s = conv(drop(x), a)``, the projection to rank space of a convolution: the unfold formula."""

from __future__ import annotations

import torch

from fastpeft.reference._windows import dropped_channels, windows


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
    """x [N, C, *in], a [R, C / groups, *kernel] any float dtype -> s [N · out, groups · R] in x.dtype."""
    columns = windows(dropped_channels(x, p, seed), tuple(a.shape[2:]), stride, padding, dilation, groups)
    return (columns @ a.to(x.dtype).flatten(1).t()).flatten(1)
