"""y = x wᵀ + bias + scale * (s bᵀ + lora_bias) for a given s, and dx, da from ds: composed of the primitives.

x [M, K], w [N, K] frozen, s [M, R], b [N, R], y [M, N]; a [R', K] and ds [M, R'] belong to the shrink before s.
This is the part of lora_linear after its shrink and after grad_b, for callers that compute something between the two
projections (a gate over the rank, an activation). The two strategies and their choice are those of lora_linear.py.
LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3.
"""

from fastpeft.kernels.lora_expand import lora_expand
from fastpeft.kernels.lora_grad_a import lora_grad_a
from fastpeft.kernels.lora_linear import add_product, resolve_strategy
from fastpeft.kernels.lora_linear_fused import lora_linear_fused_dx, lora_linear_fused_fwd


def lora_between_fwd(x, w, s, b, bias, lora_bias, scale, *, strategy="auto"):
    """y [M, N]; x [M, K] and s [M, R] with contiguous rows, w [N, K] in x.dtype, b any float dtype and strides."""
    if resolve_strategy("forward", strategy, x, w, b.shape[1], 0.0) == "fused":
        return lora_linear_fused_fwd(x, w, s, b, bias, lora_bias, scale)
    y = lora_expand(s, b, bias, lora_bias, scale)
    add_product(y, x, w.t())
    return y


def lora_between_bwd(dy, x, w, ds, a, p, seed, need_dx, need_da, *, strategy="auto"):
    """(dx [M, K], da [R, K]); an empty tensor for a gradient that is not needed. Without need_da x is not read."""
    if dy.stride(1) != 1 or dy.stride(0) < dy.shape[1]:
        dy = dy.contiguous()  # autograd hands over expanded and transposed gradients
    if need_dx and resolve_strategy("backward", strategy, dy, w, a.shape[0], p) == "fused":
        da, _ = lora_grad_a(x, ds, a, p, seed, False, need_da)
        return lora_linear_fused_dx(dy, w, ds, a, p, seed), da
    da, dx = lora_grad_a(x, ds, a, p, seed, need_dx, need_da)
    if need_dx:
        add_product(dx, dy, w)
    return dx, da
