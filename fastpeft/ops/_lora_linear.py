"""The autograd function of `fastpeft.ops.lora_linear`, and the raw operators below it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastpeft.ops import _calls, _derivatives, _flops, _library

FWD = "lora_linear_fwd"
BWD = "lora_linear_bwd"


def _fake_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scale: float,
    p: float,
    seed: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    s = x.new_empty(x.shape[0], a.shape[0], dtype=_library.rank_dtype(x.dtype, backend))
    return x.new_empty(x.shape[0], w.shape[0]), s


def _fake_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float,
    p: float,
    seed: torch.Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_bias: bool,
    mask_a: torch.Tensor | None,
    mask_b: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        dy.new_empty(dy.shape[0], w.shape[1]) if need_dx else dy.new_empty(0),
        a.new_empty(a.shape) if need_da else a.new_empty(0),
        b.new_empty(b.shape) if need_db else b.new_empty(0),
        dy.new_empty(dy.shape[1] if need_bias else 0, dtype=torch.promote_types(dy.dtype, torch.float32)),
    )


def _describe(
    x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: object, bias: object, lora_bias: object, scale: float,
    p: float, seed: object,
) -> _library.Call:  # fmt: skip
    return _library.described_linear("lora_linear", x, w.shape[0], a.shape[0], p)


def _flops_bwd(
    dy: torch.Tensor, x: object, w: object, a: torch.Tensor, b: object, s: object, scale: float, p: float, seed: object,
    need_dx: bool, need_da: bool, need_db: bool, need_bias: bool, mask_a: object, mask_b: object,
) -> int:  # fmt: skip
    (M, N), (R, K) = dy.shape, a.shape
    return _flops.backward(M, N, K, R, need_dx, need_da, need_db)


_library.register(FWD, _fake_fwd, describe=_describe)
_library.register(BWD, _fake_bwd, flops=_flops_bwd)


class Function(torch.autograd.Function):
    """Saves what the needed gradients read, the weight uncopied; the mask is drawn again from the seed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        bias: torch.Tensor | None,
        lora_bias: torch.Tensor | None,
        seed: torch.Tensor | None,
        call: tuple[float, float, torch.dtype, str],
        mask_a: torch.Tensor | None = None,
        mask_b: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y, s = forward(x, w, a, b, bias, lora_bias, seed, call)
        need_x, need_w, need_a, need_b, need_bias, need_lora_bias = ctx.needs_input_grad[:6]
        kept = (
            x if need_a or need_w else None,
            w if need_x else None,
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
        if need_w:
            ctx.weight_dtype = w.dtype
        if need_bias or need_lora_bias:
            ctx.bias_dtypes = (None if bias is None else bias.dtype, None if lora_bias is None else lora_bias.dtype)
        if need_b and not (need_x and need_a) and _derivatives.linked(need_x, need_w, need_a):
            ctx.set_materialize_grads(False)
            return y, s
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, ds: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        return _derived(ctx, dy, ds) if _derivatives.derived(dy, ds) else _backward(ctx, dy)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, w, a, b, s, seed, *masks = ctx.saved_tensors
    scale, p, dtype, backend = ctx.call
    need_dx, need_dw, need_da, need_db, need_bias, need_lora_bias = ctx.needs_input_grad[:6]
    dy = _calls.rows(dy, dy.shape[-1], dtype)
    mask_a, mask_b = _calls.masks(masks)
    # A tensor that was not saved is not read; a launcher takes its sizes from the others.
    x = dy.new_empty(0) if x is None else _calls.rows(x, ctx.shape[-1], dtype)
    s = dy.new_empty(0) if s is None else s.contiguous()
    if a is None:
        a = _derivatives.stand_in(dy, ctx.a_like)
        b = _derivatives.stand_in(dy, ctx.b_like) if b is None else b
    w = a if w is None else w if w.dtype == dtype else w.to(dtype)
    dx, da, db, sums = _library.call(
        BWD, backend, dy, x, w, a, b, s, scale, p, seed,
        need_dx, need_da, need_db, need_bias or need_lora_bias, mask_a, mask_b,
    )  # fmt: skip
    return (
        _calls.like_input(dx, ctx.shape, ctx.dtype) if need_dx else None,
        (dy.t() @ x).to(ctx.weight_dtype) if need_dw else None,
        da if need_da else None,
        db if need_db else None,
        sums.to(ctx.bias_dtypes[0]) if need_bias else None,
        (sums * scale).to(ctx.bias_dtypes[1]) if need_lora_bias else None,
        None,
        None,
        None,
        None,
    )


def _derived(ctx: Any, dy: Any, ds: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The same gradients by the reference's formula, to be differentiated again."""
    x, w, a, b, s, seed, *masks = ctx.saved_tensors
    mask_a, mask_b = _calls.masks(masks)
    scale, p, dtype, _ = ctx.call
    need_dx, need_dw, need_da, need_db, need_bias, need_lora_bias = ctx.needs_input_grad[:6]
    with _derivatives.formula(dy, b, ctx.shape, dtype) as dy:
        x = None if x is None else _calls.rows(x, ctx.shape[-1], dtype)
        if a is None:
            a = _derivatives.stand_in(dy, ctx.a_like)
            b = _derivatives.stand_in(dy, ctx.b_like) if b is None else b
        dx, da, db = _derivatives.adapter(dy, ds, x, a, b, s, scale, p, seed, need_dx, need_da, need_db, mask_a, mask_b)
        sums = _derivatives.bias_gradient(dy) if need_bias or need_lora_bias else dy
        return (
            (dx + dy @ w.to(dtype)).reshape(ctx.shape).to(ctx.dtype) if need_dx else None,
            (dy.t() @ x).to(ctx.weight_dtype) if need_dw else None,
            da if need_da else None,
            db if need_db else None,
            sums.to(ctx.bias_dtypes[0]) if need_bias else None,
            (sums * scale).to(ctx.bias_dtypes[1]) if need_lora_bias else None,
            None,
            None,
            None,
            None,
        )


# Function.apply wraps this one in Python, only to unwrap functorch's tensors, and costs a tiny call 3 %.
apply = super(torch.autograd.Function, Function).apply


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    call: tuple[float, float, torch.dtype, str],
    run: Callable[..., Any] = _library.call,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale, p, dtype, backend = call
    rows = _calls.rows(x, w.shape[1], dtype)
    if w.dtype != dtype:
        w = w.to(dtype)
    y, s = run(FWD, backend, rows, w, a, b, bias, lora_bias, scale, p, seed)
    return _calls.shaped(y, x.shape[:-1]), s
