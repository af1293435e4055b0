"""Where a convolution's taps read: the arithmetic of positions that its Triton kernels share.

An activation is [rows, CT], dense and channels-last: a row is a position (n, d, h, w), a plane has d = 1. The row of x
is also the row of the dropout mask.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import narrow
from fastpeft.kernels._launch import PLANS, record


class Windows(NamedTuple):
    """A convolution as the kernels take it: sizes of input and output; kernel, stride, padding and dilation as form."""

    N: int
    sizes: tuple
    form: tuple
    taps: int

    @property
    def M(self):
        return self.N * self.sizes[3] * self.sizes[4] * self.sizes[5]

    @property
    def constants(self):
        """Compiled into a kernel."""
        return dict(zip(("KERNEL", "STRIDE", "PADDING", "DILATION"), self.form, strict=True))

    @property
    def rows(self):
        return self.N * self.sizes[0] * self.sizes[1] * self.sizes[2]


@lru_cache(maxsize=PLANS)
def windows_of(shape, kernel, stride, padding, dilation):
    """`Windows` of x [N, C, *in] of two or three dimensions, all as tuples; the first of two is 1."""
    lead = [1] * (3 - len(kernel))
    inside, kernel, stride, dilation = ((*lead, *list(v)) for v in (shape[2:], kernel, stride, dilation))
    padding = (*[0] * len(lead), *padding)
    out = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(inside, kernel, stride, padding, dilation, strict=True)
    )
    form = kernel, stride, padding, dilation
    return Windows(shape[0], (*inside, *out), form, kernel[0] * kernel[1] * kernel[2])


def last(x):
    """x [N, C, *in] dense and channels-last: itself, or a copy."""
    to = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if not x.is_contiguous(memory_format=to):
        record("channels_last", 0, x.numel() * x.element_size(), x.numel() * x.element_size())
        x = x.contiguous(memory_format=to)
    return x


def packed(a, dtype):
    """a [R, C, *kernel] as [R, taps, C] in `dtype`: a tap's channels side by side, as they are in x."""
    a = narrow(a).flatten(2).transpose(1, 2)
    out = a.to(dtype, memory_format=torch.contiguous_format).contiguous()
    if out.data_ptr() != a.data_ptr() or a.is_meta:
        record("pack_a", 0, a.numel() * a.element_size(), out.numel() * out.element_size())
    return out


def column_blocks(C, CT, groups, subs):
    """(SUBS, blocks): sub-blocks of 32 columns a step takes, and the steps that cover one group's C columns.

    Steps start at multiples of their width in x's CT columns.
    """
    subs = min(subs, -(-CT // 32))
    width = 32 * subs
    aligned = groups == 1 or C % width == 0
    return subs, -(-C // width) if aligned else -(-(C - 1) // width) + 1


@triton.jit
def position(row, D, H, W):
    """(n, d, h, w) of rows of an activation."""
    rest = row // W
    plane = rest // H
    return plane // D, plane % D, rest % H, row % W


@triton.jit
def tap_of(index, KERNEL: tl.constexpr):
    """(d, h, w) of a tap."""
    rest = index // KERNEL[2]
    return rest // KERNEL[1], rest % KERNEL[1], index % KERNEL[2]


@triton.jit
def _reads(o, tap, I, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr):
    at = o * STRIDE - PADDING + tap * DILATION
    return at, (at >= 0) & (at < I)


@triton.jit
def input_rows(
    n, d, h, w, tap, ID, IH, IW, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr,
):  # fmt: skip
    """The row of x, int64, that a tap of an output position reads, and whether it is none of the padding's."""
    td, th, tw = tap_of(tap, KERNEL)
    d, in_d = _reads(d, td, ID, STRIDE[0], PADDING[0], DILATION[0])
    h, in_h = _reads(h, th, IH, STRIDE[1], PADDING[1], DILATION[1])
    w, in_w = _reads(w, tw, IW, STRIDE[2], PADDING[2], DILATION[2])
    return (((n * ID + d) * IH + h) * IW + w).to(tl.int64), in_d & in_h & in_w


@triton.jit
def _read_by(i, tap, O, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr):
    steps = i + PADDING - tap * DILATION
    return steps // STRIDE, (steps >= 0) & (steps % STRIDE == 0) & (steps // STRIDE < O)


@triton.jit
def output_rows(
    n, d, h, w, tap, OD, OH, OW, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr,
):  # fmt: skip
    """The row of the output, int64, whose tap reads an input position, and whether there is one."""
    td, th, tw = tap_of(tap, KERNEL)
    d, of_d = _read_by(d, td, OD, STRIDE[0], PADDING[0], DILATION[0])
    h, of_h = _read_by(h, th, OH, STRIDE[1], PADDING[1], DILATION[1])
    w, of_w = _read_by(w, tw, OW, STRIDE[2], PADDING[2], DILATION[2])
    return (((n * OD + d) * OH + h) * OW + w).to(tl.int64), of_d & of_h & of_w
