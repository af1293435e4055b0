"""``y = scale · (drop(x) Aᵀ Bᵀ + lora_bias)``: LoRA without a base, composed of the four primitives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastpeft import dispatch
from fastpeft.ops import _calls, _checks, _derivatives, _library


def _describe(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, p: float) -> _library.Call:
    (M, K), (N, R), ours = x.shape, b.shape, "its two products, no base"
    flop, elements = 2 * M * R * (K + N), M * K + M * N
    return _library.described(
        "lora_adapter", x, flop=flop, elements=elements, p=p, strategy=ours, M=M, K=K, N=N, rank=R
    )


_library.register_composed("lora_adapter", _describe)


class _LoRAAdapter(torch.autograd.Function):
    """Saves what the needed gradients read; the mask is drawn again from the seed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        lora_bias: torch.Tensor | None,
        seed: torch.Tensor | None,
        call: tuple[float, float, torch.dtype, str],
        mask_a: torch.Tensor | None = None,
        mask_b: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y, s = _forward(x, a, b, lora_bias, seed, call)
        need_x, need_a, need_b, need_bias = ctx.needs_input_grad[:4]
        kept = (
            x if need_a else None,
            a if need_x else None,
            b if need_x or need_a else None,
            s if need_b else None,
            seed,
        )
        masked = mask_a is not None or mask_b is not None
        ctx.save_for_backward(*kept, mask_a, mask_b) if masked else ctx.save_for_backward(*kept)
        ctx.call, ctx.shape, ctx.dtype = call, x.shape, x.dtype
        if not need_x:
            ctx.a_like = a.shape, a.dtype
            if not need_a:
                ctx.b_like = b.shape, b.dtype
        if need_bias:
            ctx.bias_dtype = None if lora_bias is None else lora_bias.dtype
        if need_b and not (need_x and need_a) and _derivatives.linked(need_x, False, need_a):
            ctx.set_materialize_grads(False)
            return y, s
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, ds: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        return _derived(ctx, dy, ds) if _derivatives.derived(dy, ds) else _backward(ctx, dy)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, a, b, s, seed, *masks = ctx.saved_tensors
    mask_a, mask_b = _calls.masks(masks)
    scale, p, dtype, backend = ctx.call
    need_dx, need_da, need_db, need_bias = ctx.needs_input_grad[:4]
    dy = _calls.rows(dy, dy.shape[-1], dtype)
    # A tensor that was not saved is not read; a launcher takes its sizes from the others.
    s = dy.new_empty(0) if s is None else s.contiguous()
    if a is None:
        a = _derivatives.stand_in(dy, ctx.a_like)
        b = _derivatives.stand_in(dy, ctx.b_like) if b is None else b
    ds, db, sums = _library.call("lora_grad_b", backend, dy, s, b, scale, need_db, need_bias, mask_b)
    da = dx = dy
    if need_dx or need_da:
        x = dy.new_empty(0) if x is None else _calls.rows(x, ctx.shape[-1], dtype)
        da, dx = _library.call("lora_grad_a", backend, x, ds, a, p, seed, need_dx, need_da, mask_a)
    return (
        _calls.like_input(dx, ctx.shape, ctx.dtype) if need_dx else None,
        da if need_da else None,
        db if need_db else None,
        (sums * scale).to(ctx.bias_dtype) if need_bias else None,
        None,
        None,
        None,
        None,
    )


def _derived(ctx: Any, dy: torch.Tensor | None, ds: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The same gradients by the reference's formula, to be differentiated again."""
    x, a, b, s, seed, *masks = ctx.saved_tensors
    mask_a, mask_b = _calls.masks(masks)
    scale, p, dtype, _ = ctx.call
    need_dx, need_da, need_db, need_bias = ctx.needs_input_grad[:4]
    with _derivatives.formula(dy, b, ctx.shape, dtype) as dy:
        x = None if x is None else _calls.rows(x, ctx.shape[-1], dtype)
        if a is None:
            a = _derivatives.stand_in(dy, ctx.a_like)
            b = _derivatives.stand_in(dy, ctx.b_like) if b is None else b
        dx, da, db = _derivatives.adapter(dy, ds, x, a, b, s, scale, p, seed, need_dx, need_da, need_db, mask_a, mask_b)
        return (
            dx.reshape(ctx.shape).to(ctx.dtype) if need_dx else None,
            da if need_da else None,
            db if need_db else None,
            (_derivatives.bias_gradient(dy) * scale).to(ctx.bias_dtype) if need_bias else None,
            None,
            None,
            None,
            None,
        )


def _forward(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    lora_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    call: tuple[float, float, torch.dtype, str],
    run: Callable[..., Any] = _library.launch,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale, p, dtype, backend = call
    rows = _calls.rows(x, a.shape[1], dtype)
    _library.tell("lora_adapter", backend, rows, a, b, p)
    s = run("lora_shrink", backend, rows, a, p, seed)
    y = run("lora_expand", backend, s, b, None, lora_bias, scale)
    return _calls.shaped(y, x.shape[:-1]), s


_Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", float]
"""x, lora_A, lora_B, lora_bias, dropout."""


def _check(given: _Given) -> None:
    """Raise the error for what is wrong; called only when ``_fits`` is False."""
    op = "lora_adapter"
    x, lora_A, lora_B, lora_bias, dropout = given
    _checks.activation(op, x)
    _checks.matrix(op, "lora_A", lora_A, (None, None), "[rank, in_features]")
    _checks.matrix(op, "lora_B", lora_B, (None, None), "[out_features, rank]")
    sure = lora_A.shape[0] == lora_B.shape[1], lora_A.device == lora_B.device
    _checks.entrance(op, x, "lora_A", lora_A.shape[1], lora_A.device, sure=sure)
    _checks.adapter(op, x, None, lora_A, lora_B, lora_bias, dropout)


def _fits(given: _Given) -> bool:
    """Same tests as ``_check``: cheap, as they run at every call, and traceable with symbolic sizes."""
    x, lora_A, lora_B, lora_bias, dropout = given
    try:
        N, device = lora_B.shape[0], x.device
        return (
            x.dtype in _checks.FLOATS
            and x.layout is _checks.STRIDED
            and _checks.adapter_fits(x.shape[-1], N, device, lora_A, lora_B, lora_bias, dropout)
        )
    except _checks.UNFIT:
        return False


def lora_adapter(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    lora_bias: torch.Tensor | None = None,
    *,
    scale: float | torch.Tensor = 1.0,
    dropout: float = 0.0,
    masks: _derivatives.Masks = None,
    backend: str | None = None,
) -> torch.Tensor:
    """y = scale · (drop(x) Aᵀ Bᵀ + lora_bias)                      Hu et al. 2021, arXiv:2106.09685, eq. 3 without W

    x          [..., K]  fp32 | bf16 | fp16 (fp64 with the eager backend), any strides
    lora_A     [R, K]    any float dtype and strides; R >= 1
    lora_B     [N, R]    any float dtype and strides
    lora_bias  [N]       any float dtype, or None
    scale      float or 0-d tensor, dimensionless
    dropout    probability in [0, 1) that an element of x is hidden from A, as in lora_linear
    masks      as in lora_linear
    backend    "cpp" | "triton" | "eager", or None for the first that serves
    Returns    y [..., N] in x.dtype, under autocast in its dtype; summed in fp32. Differentiable, any number of
               times, in every tensor but a float scale; gradients of gradients are the reference's
    Saves      x (the caller's own tensor), s = drop(x) Aᵀ [M, R] and the seed; what no gradient needs is not saved
    Cost       2MR(K + N) FLOP forward, twice that backward; x is read once and y written once each way
    Raises     ValueError: shape, device, dropout or backend.  TypeError: dtype.
    """
    given: _Given = (x, lora_A, lora_B, lora_bias, dropout)
    if not _fits(given):
        _check(given)
    device = x.device
    dtype = _calls.autocast_dtype(x, device.type) or x.dtype
    compiling = torch.compiler.is_compiling()
    if type(scale) is not float or compiling:
        scale, lora_B, lora_bias = _calls.fold_scale("lora_adapter", scale, lora_B, lora_bias, compiling)
    seed = _calls.draw_seed(device) if dropout else None
    if masks is not None:
        _checks.masks("lora_adapter", masks, lora_A, lora_B)
    if _derivatives.composed("lora_adapter", backend, compiling):
        if masks is not None:
            lora_A, lora_B = _derivatives.masked(lora_A, lora_B, *masks)
        return _forward(x, lora_A, lora_B, lora_bias, seed, (scale, dropout, dtype, "eager"), _derivatives.run)[0]
    chosen = dispatch.select("lora_shrink", backend, device.type, dtype, "lora_adapter")
    args = (x, lora_A, lora_B, lora_bias, seed, (scale, dropout, dtype, chosen))
    if not torch.is_grad_enabled():
        return _forward(*args)[0]
    y = _LoRAAdapter.apply(*args, *(masks or ()))
    return y[0] if type(y) is tuple else y
