"""y = x wᵀ + bias + scale * (drop(x) aᵀ bᵀ + lora_bias), forward and backward, composed of this folder's primitives.

x [M, K], w [N, K] frozen, a [R, K], b [N, R], y [M, N]; s = drop(x) aᵀ [M, R] is all that forward keeps beyond x.
accumulate  shrink, expand writes y, vendor GEMM y += x wᵀ   | grad_b, grad_a writes dx, vendor GEMM dx += dy w
fused       shrink, GEMM with the rank-R product inside      | grad_b, grad_a, GEMM with the masked product inside
Elements moved, forward and backward, besides the frozen weight and terms of rank R: accumulate 2MK + 3MN, 4MK + 2MN;
fused 2MK + MN, 2MK + 2MN. `strategy="auto"` decides by data, separately for each pass: the tuned table, else the cost
model (`_cost.choose_strategy`).
LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3.
"""

import torch

from fastpeft.kernels._cost import choose_strategy, size_bucket
from fastpeft.kernels._launch import arch_of, record
from fastpeft.kernels.lora_expand import lora_expand
from fastpeft.kernels.lora_grad_a import lora_grad_a
from fastpeft.kernels.lora_grad_b import lora_grad_b
from fastpeft.kernels.lora_linear_fused import can_fuse, lora_linear_fused_dx, lora_linear_fused_fwd
from fastpeft.kernels.lora_shrink import lora_shrink

STRATEGIES = ("accumulate", "fused", "auto")


def resolve_strategy(side, strategy, x, w, R, p):
    """ "accumulate" or "fused" of one pass: "forward", whose x is [M, K], or "backward", whose x is dy [M, N].

    "auto" takes fused only where `can_fuse` allows; an explicit "fused" that cannot be served raises ValueError.
    """
    if strategy == "accumulate":
        return strategy
    if strategy not in STRATEGIES:
        raise ValueError(f"lora_linear: strategy must be one of {STRATEGIES}, got {strategy!r}")
    if strategy == "auto":
        M, (N, K) = size_bucket(x.shape[0]), w.shape
        if choose_strategy(side, M, N, K, R, p > 0, x.dtype, arch_of(x)) == "accumulate":
            return "accumulate"
    reason = can_fuse(x, w)
    if reason and strategy == "fused":
        raise ValueError(f"lora_linear: strategy must be 'accumulate' or 'auto' here, got 'fused', which {reason}")
    return "accumulate" if reason else "fused"


def lora_linear_fwd_strategy(x, w, a, b, bias, lora_bias, scale, p, seed):
    """What ``lora_linear_fwd`` does with these arguments, in words."""
    if resolve_strategy("forward", "auto", x, w, a.shape[0], p) == "fused":
        return "fused: the rank-R product first, then one GEMM that takes it into its sum"
    return "accumulate: rank-R product first, then the vendor GEMM with beta = 1"


def add_product(out, left, right):
    """out += left right by the vendor's GEMM; with beta = 1 its read of out hides in the epilogue."""
    item = out.element_size()
    (M, J), N = left.shape, right.shape[1]
    record("gemm", 2 * M * J * N, (M * J + M * N) * item, M * N * item, weight_bytes=J * N * item)
    out.addmm_(left, right)


def lora_linear_fwd(x, w, a, b, bias, lora_bias, scale, p, seed, *, strategy="auto"):
    """(y [M, N], s [M, R]); x [M, K] with contiguous rows, w [N, K] in x.dtype, a and b any float dtype and strides."""
    s = lora_shrink(x, a, p, seed)
    if resolve_strategy("forward", strategy, x, w, a.shape[0], p) == "fused":
        return lora_linear_fused_fwd(x, w, s, b, bias, lora_bias, scale), s
    y = lora_expand(s, b, bias, lora_bias, scale)
    add_product(y, x, w.t())
    return y, s


def lora_linear_bwd(
    dy, x, w, a, b, s, scale, p, seed, need_dx, need_da, need_db, need_bias, mask_a=None, mask_b=None, *,
    strategy="auto",
):  # fmt: skip
    """(dx [M, K], da [R, K], db [N, R], dbias [N] fp32); an empty tensor for a gradient that is not needed.

    mask_a, mask_b    bits of da and of dbᵀ, as in lora_grad_a and lora_grad_b, or None
    """
    if dy.stride(1) != 1 or dy.stride(0) < dy.shape[1]:
        dy = dy.contiguous()  # autograd hands over expanded and transposed gradients
    need_ds = need_dx or need_da
    dx, da = x.new_empty(0), a.new_empty(0)
    if not (need_ds or need_db or need_bias):
        return dx, da, b.new_empty(0), torch.empty(0, device=x.device, dtype=torch.float32)
    ds, db, dbias = lora_grad_b(dy, s, b, scale, need_db, need_bias, mask_b)
    if need_dx and resolve_strategy("backward", strategy, dy, w, a.shape[0], p) == "fused":
        if need_da:
            da, _ = lora_grad_a(x, ds, a, p, seed, False, True, mask_a)
        return lora_linear_fused_dx(dy, w, ds, a, p, seed), da, db, dbias
    if need_ds:
        da, dx = lora_grad_a(x, ds, a, p, seed, need_dx, need_da, mask_a)
    if need_dx:
        add_product(dx, dy, w)
    return dx, da, db, dbias
