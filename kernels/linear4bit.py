"""y = x wᵀ + bias + scale * (drop(x) aᵀ bᵀ + lora_bias), forward and backward, with w [N, K] kept in 4 bits.

small       up to 64 rows: shrink, one kernel on the packed bytes       | grad_b, grad_a writes dx, its twin adds dy w
accumulate  shrink, expand writes y, dequantise, vendor GEMM y += x wᵀ  | grad_b, grad_a, dequantise, dx += dy w
augmented   shrink writes [x | s], dequantise [w | scale b], one vendor GEMM; backward as accumulate
`_fourbit_cost.choose_small` and `choose_augmented` decide by data. Elements moved beyond those of lora_linear's
"accumulate": all but small write and read NK of x's dtype once per pass; augmented writes MK more, but y only once.
The dequantised weight lives from one launch to the next, in memory of torch's allocator, a cache by device and stream
that grows, empties and follows CUDA graph capture by itself. A buffer kept here would outlive a graph's private pool,
and two threads on one stream would share it.
QLoRA: Dettmers et al. 2023, arXiv:2305.14314, eq. 5.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fastpeft.kernels._cost import size_bucket
from fastpeft.kernels._fourbit_cost import choose_augmented, choose_small
from fastpeft.kernels._launch import arch_of, record
from fastpeft.kernels.dequantize_4bit import dequantize_4bit
from fastpeft.kernels.linear4bit_small import linear4bit_small, linear4bit_small_dx, small_unmet
from fastpeft.kernels.lora_expand import lora_expand
from fastpeft.kernels.lora_grad_a import lora_grad_a
from fastpeft.kernels.lora_grad_b import lora_grad_b
from fastpeft.kernels.lora_shrink import lora_shrink


class Primitives(NamedTuple):
    """The kernels on packed bytes; a backend with its own kernels composes them in the same way.

    takes    (K, packed) -> whether its products of few rows support such a weight; if not, it is dequantised
    """

    dequantize_4bit: Callable
    linear4bit_small: Callable
    linear4bit_small_dx: Callable
    takes: Callable


TRITON = Primitives(dequantize_4bit, linear4bit_small, linear4bit_small_dx, lambda K, packed: True)


def use_small(x, N, K, block_size):
    """Whether these rows, x in forward and dy in backward, multiply the packed weight without dequantising it."""
    M = x.shape[0]
    if small_unmet(M, K, block_size):
        return False
    return choose_small(M, N, K, x.dtype, block_size, arch_of(x))


def use_augmented(x, N, R):
    """Whether [x | s] is multiplied by the dequantised [w | scale b], so that y is written once."""
    M, K = x.shape
    return M > 0 and N > 0 and R > 0 and choose_augmented(size_bucket(M), N, K, R, x.dtype, arch_of(x))


def linear4bit_fwd_strategy(
    x, packed, scales, quant_type, block_size, N, a, b, bias, lora_bias, scale, p, seed, primitives=TRITON
):
    """What ``linear4bit_fwd`` does with these arguments, in words."""
    if use_small(x, N, x.shape[1], block_size) and primitives.takes(x.shape[1], packed):
        return "small: one kernel reads the packed weight"
    if a is not None and use_augmented(x, N, a.shape[0]):
        return "augmented: the weight is dequantised into a buffer beside lora_B, then one vendor GEMM over K + R"
    if a is None:
        return "dequant: the weight is dequantised into a buffer, then the vendor GEMM; there is no adapter"
    return "accumulate: rank-R product first, the weight dequantised into a buffer, then the vendor GEMM with beta = 1"


def _dequantized(like, packed, scales, quant_type, block_size, N, K, primitives):
    w = torch.empty((N, K), device=like.device, dtype=like.dtype)
    primitives.dequantize_4bit(packed, scales, quant_type, block_size, w)
    return w


def whole_bias(bias, lora_bias, scale):
    """bias + scale · lora_bias, in fp32 where there is a lora_bias; None without both."""
    if lora_bias is None:
        return bias
    return lora_bias.float() * scale if bias is None else torch.add(bias.float(), lora_bias, alpha=scale)


def _augmented(x, weight, N, a, b, bias, lora_bias, scale, p, seed, primitives):
    """(y, s) of one GEMM over K + R; rows of both factors are multiples of 16 bytes, the padding zero."""
    (M, K), R = x.shape, a.shape[0]
    step = 16 // x.element_size()
    width = -(-(K + R) // step) * step
    left, right = x.new_empty(M, width), x.new_empty(N, width)
    s = lora_shrink(x, a, p, seed, copy=left[:, :K])
    primitives.dequantize_4bit(*weight, right[:, :K])
    for factor, tail in ((left, s), (right, b.float() * scale)):
        factor[:, K + R :].zero_()
        factor[:, K : K + R].copy_(tail)
    record("augment", 0, M * R * x.element_size() + N * R * b.element_size(), (M + N) * (width - K) * x.element_size())
    return _product(left, right.t(), None, whole_bias(bias, lora_bias, scale)), s


def _product(left, right, out=None, bias=None):
    """left right by the vendor's GEMM: added to `out` in place, or with a bias [N] in the epilogue, or plain."""
    item = left.element_size()
    (M, J), N = left.shape, right.shape[1]
    read = (M * J + M * N * (out is not None) + N * (bias is not None)) * item
    record("gemm", 2 * M * J * N, read, M * N * item, weight_bytes=J * N * item)
    if out is not None:
        return out.addmm_(left, right)
    return left @ right if bias is None else torch.addmm(bias.to(left.dtype), left, right)


def linear4bit_fwd(
    x, packed, scales, quant_type, block_size, N, a, b, bias, lora_bias, scale, p, seed, primitives=TRITON
):
    """(y [M, N], s [M, R] or [0] without an adapter); x with contiguous rows, a and b any float dtype and strides."""
    K = x.shape[1]
    weight = (packed, scales, quant_type, block_size)
    small = use_small(x, N, K, block_size) and primitives.takes(K, packed)
    if not small and a is not None and use_augmented(x, N, a.shape[0]):
        return _augmented(x, weight, N, a, b, bias, lora_bias, scale, p, seed, primitives)
    s = x.new_empty(0) if a is None else lora_shrink(x, a, p, seed)
    if small:
        return primitives.linear4bit_small(x, *weight, N, s, b, bias, lora_bias, scale), s
    y = None if a is None else lora_expand(s, b, bias, lora_bias, scale)
    w = _dequantized(x, *weight, N, K, primitives)
    return _product(x, w.t(), y, bias), s


def linear4bit_bwd(
    dy, x, packed, scales, quant_type, block_size, K, a, b, s, scale, p, seed,
    need_dx, need_da, need_db, need_bias, primitives=TRITON,
):  # fmt: skip
    """(dx [M, K], da [R, K], db [N, R], dbias [N] fp32); an empty tensor for a gradient that is not needed."""
    if dy.stride(1) != 1 or dy.stride(0) < dy.shape[1]:
        dy = dy.contiguous()  # autograd hands over expanded and transposed gradients
    da, db = (dy.new_empty(0), dy.new_empty(0)) if a is None else (a.new_empty(0), b.new_empty(0))
    dx, dbias = None, torch.empty(0, device=dy.device, dtype=torch.float32)
    need_ds = need_dx or need_da
    if a is None and need_bias:
        dbias = dy.sum(0, dtype=torch.float32)
    elif a is not None and (need_ds or need_db or need_bias):
        ds, db, dbias = lora_grad_b(dy, s, b, scale, need_db, need_bias)
        if need_ds:
            da, dx = lora_grad_a(x, ds, a, p, seed, need_dx, need_da)
    if not need_dx:
        return dy.new_empty(0), da, db, dbias
    N, weight = dy.shape[1], (packed, scales, quant_type, block_size)
    if use_small(dy, N, K, block_size) and primitives.takes(K, packed):
        return primitives.linear4bit_small_dx(dy, *weight, K, dx), da, db, dbias
    w = _dequantized(dy, *weight, N, K, primitives)
    return _product(dy, w, dx), da, db, dbias
