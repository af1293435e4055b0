"""The base product and the rank-R product in one GEMM with one accumulator."""

from __future__ import annotations

import torch

from fastpeft import dispatch
from fastpeft.ops import _checks, _library


def _fake_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scale: float,
    backend: str,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


def _fake_dx(
    dy: torch.Tensor,
    w: torch.Tensor,
    ds: torch.Tensor,
    a: torch.Tensor,
    p: float,
    seed: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    return dy.new_empty(dy.shape[0], w.shape[1])


def _describe(op: str, x: torch.Tensor, N: int, R: int, p: float = 0.0) -> _library.Call:
    M, K = x.shape
    flop, elements = 2 * M * N * (K + R), M * K + N * K + M * N
    return _library.described(op, x, flop=flop, elements=elements, p=p, M=M, K=K, N=N, rank=R)


def _describe_fwd(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, *_: object) -> _library.Call:
    return _describe("lora_linear_fused_fwd", x, w.shape[0], s.shape[1])


def _describe_dx(
    dy: torch.Tensor, w: torch.Tensor, ds: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None
) -> _library.Call:
    return _describe("lora_linear_fused_dx", dy, w.shape[1], ds.shape[1], p)


_library.register("lora_linear_fused_fwd", _fake_fwd, describe=_describe_fwd)
_library.register("lora_linear_fused_dx", _fake_dx, describe=_describe_dx)


def _select(op: str, backend: str | None, name: str, x: torch.Tensor, w: torch.Tensor, width: int) -> str:
    """The backend that will serve; Triton also depends on the operands' layout, because the GPU's copy engine does."""
    chosen = dispatch.select(op, backend, x.device.type, x.dtype)
    # A traced tensor has no address to check, and an empty output of ``width`` columns needs no kernel.
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if chosen == "triton" and not traced and x.shape[0] and width:
        unmet = dispatch.fuse_unmet(x, w, name)
        if unmet is not None:
            _checks.require(False, op, *unmet)
    return chosen


def lora_linear_fused_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """``y = x wᵀ + bias + scale · (s bᵀ + lora_bias)`` in one GEMM; no autograd.

    x [M, K], w [N, K], s [M, R] of one dtype (fp32 | bf16 | fp16); b [N, R], bias [N], lora_bias [N] in any float type.
    For the Triton backend N, K and the row strides of x and w are multiples of 8, their rows contiguous.
    Returns    y [M, N] in x.dtype, summed in fp32
    Cost       2MN(K + R) FLOP; reads x, w, writes y once
    Raises     ValueError: shape, backend, or alignment that the GPU's copy engine needs.  TypeError: dtype.
    """
    op = "lora_linear_fused_fwd"
    _checks.matrix(op, "x", x, (None, None), "[M, K]")
    _checks.matrix(op, "w", w, (None, x.shape[1]), "[N, K]")
    _checks.matrix(op, "s", s, (x.shape[0], None), "[M, R]")
    _checks.matrix(op, "b", b, (w.shape[0], s.shape[1]), "[N, R]")
    _checks.vector(op, "bias", bias, w.shape[0], "N")
    _checks.vector(op, "lora_bias", lora_bias, w.shape[0], "N")
    for name, value in (("w", w), ("s", s)):
        _checks.require_dtype(value.dtype == x.dtype, op, name, f"have the dtype of x, {x.dtype}", value.dtype)
    _checks.same_device(op, x.device, w=w, s=s, b=b, bias=bias, lora_bias=lora_bias)
    chosen = _select(op, backend, "x", x, w, w.shape[0])
    return _library.call(op, chosen, x, w, s.contiguous(), b, bias, lora_bias, scale)


def lora_linear_fused_dx(
    dy: torch.Tensor,
    w: torch.Tensor,
    ds: torch.Tensor,
    a: torch.Tensor,
    p: float = 0.0,
    seed: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """``dx = dy w + mask ∘ (ds a) / keep`` in one GEMM; no autograd.

    dy [M, N], w [N, K], ds [M, R] of one dtype (fp32 | bf16 | fp16); a [R, K] any float dtype; p, seed of lora_shrink.
    For the Triton backend dy and w are laid out as x and w are for ``lora_linear_fused_fwd``
    Returns    dx [M, K] in dy.dtype, summed in fp32
    Cost       2MK(N + R) FLOP; reads dy, w, writes dx once
    Raises     ValueError: shape, p, backend, or alignment that the GPU's copy engine needs.  TypeError: dtype.
    """
    op = "lora_linear_fused_dx"
    _checks.matrix(op, "dy", dy, (None, None), "[M, N]")
    _checks.matrix(op, "w", w, (dy.shape[1], None), "[N, K]")
    _checks.matrix(op, "ds", ds, (dy.shape[0], None), "[M, R]")
    _checks.matrix(op, "a", a, (ds.shape[1], w.shape[1]), "[R, K]")
    for name, value in (("w", w), ("ds", ds)):
        _checks.require_dtype(value.dtype == dy.dtype, op, name, f"have the dtype of dy, {dy.dtype}", value.dtype)
    _checks.same_device(op, dy.device, w=w, ds=ds, a=a)
    _checks.probability(op, "p", p)
    _checks.seed(op, seed, p)
    chosen = _select(op, backend, "dy", dy, w, w.shape[1])
    return _library.call(op, chosen, dy, w, ds.contiguous(), a, p, seed if p else None)
