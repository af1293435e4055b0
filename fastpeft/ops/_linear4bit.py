"""The autograd function of `fastpeft.ops.linear4bit`, with and without an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastpeft.ops import _calls, _derivatives, _library

FWD = "linear4bit_fwd"
BWD = "linear4bit_bwd"

_Call = tuple[float, float, torch.dtype, str, str, int, int, int]
"""scale, p, dtype, backend, quant_type, block_size, N, K."""


class Function(torch.autograd.Function):
    """Saves what the needed gradients read; the mask is drawn and the weight dequantised again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        bias: torch.Tensor | None,
        lora_bias: torch.Tensor | None,
        seed: torch.Tensor | None,
        call: _Call,
        packed: torch.Tensor,
        *scales: torch.Tensor,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y, s = compute(x, a, b, bias, lora_bias, seed, call, packed, *scales)
        need_x, need_a, need_b, need_bias, need_lora_bias = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_a else None,
            a if need_x else None,
            b if need_x or need_a else None,
            s if need_b else None,
            seed,
            *((packed, *scales) if need_x else (None,)),
        )
        ctx.call, ctx.shape, ctx.dtype = call, x.shape, x.dtype
        if not need_x:
            ctx.a_like, ctx.b_like = (None if t is None else (t.shape, t.dtype) for t in (a, b))
        if need_bias or need_lora_bias:
            ctx.bias_dtypes = (None if bias is None else bias.dtype, None if lora_bias is None else lora_bias.dtype)
        if need_b and not (need_x and need_a) and _derivatives.linked(need_x, False, need_a):
            ctx.set_materialize_grads(False)
            return y, s
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, ds: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        gradients = _derived(ctx, dy, ds) if _derivatives.derived(dy, ds) else _backward(ctx, dy)
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - len(gradients))


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, a, b, s, seed, packed, *scales = ctx.saved_tensors
    scale, p, dtype, backend, quant_type, block_size, N, K = ctx.call
    need_dx, need_da, need_db, need_bias, need_lora_bias = ctx.needs_input_grad[:5]
    dy = _calls.rows(dy, N, dtype)
    # A tensor that was not saved is not read; a launcher takes its sizes from the others.
    x = dy.new_empty(0) if x is None else _calls.rows(x, K, dtype)
    s = dy.new_empty(0) if s is None else s.contiguous()
    if packed is None:
        packed, scales = dy.new_empty(0, dtype=torch.uint8), [dy.new_empty(0, dtype=torch.float32)]
        if ctx.a_like is not None:
            a = _derivatives.stand_in(dy, ctx.a_like)
            b = _derivatives.stand_in(dy, ctx.b_like) if b is None else b
    else:
        packed, scales = packed.contiguous(), [part.contiguous() for part in scales]
    dx, da, db, sums = _library.call(
        BWD, backend, dy, x, packed, scales, quant_type, block_size, K, a, b, s, scale, p, seed,
        need_dx, need_da, need_db, need_bias or need_lora_bias,
    )  # fmt: skip
    return (
        _calls.like_input(dx, ctx.shape, ctx.dtype) if need_dx else None,
        da if need_da else None,
        db if need_db else None,
        sums.to(ctx.bias_dtypes[0]) if need_bias else None,
        (sums * scale).to(ctx.bias_dtypes[1]) if need_lora_bias else None,
    )


def _derived(ctx: Any, dy: torch.Tensor | None, ds: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The same gradients by the reference's formula, to be differentiated again."""
    x, a, b, s, seed, packed, *scales = ctx.saved_tensors
    scale, p, dtype, _, quant_type, block_size, _, K = ctx.call
    need_dx, need_da, need_db, need_bias, need_lora_bias = ctx.needs_input_grad[:5]
    with _derivatives.formula(dy, b, ctx.shape, dtype) as dy:
        dx: Any = None
        da = db = None
        if need_dx:
            none = dy.new_empty(0)
            dx, *_ = _derivatives.reference(BWD)(
                dy, none, packed, scales, quant_type, block_size, K, None, None, none, 1.0, 0.0, None,
                True, False, False, False,
            )  # fmt: skip
        if need_da or need_db or (need_dx and a is not None):
            x = None if x is None else _calls.rows(x, K, dtype)
            if a is None:
                a = _derivatives.stand_in(dy, ctx.a_like)
                b = _derivatives.stand_in(dy, ctx.b_like) if b is None else b
            more, da, db = _derivatives.adapter(dy, ds, x, a, b, s, scale, p, seed, need_dx, need_da, need_db)
            dx = dx + more if need_dx else None
        sums = _derivatives.bias_gradient(dy) if need_bias or need_lora_bias else dy
        return (
            dx.reshape(ctx.shape).to(ctx.dtype) if need_dx else None,
            da if need_da else None,
            db if need_db else None,
            sums.to(ctx.bias_dtypes[0]) if need_bias else None,
            (sums * scale).to(ctx.bias_dtypes[1]) if need_lora_bias else None,
        )


# Function.apply wraps this one in Python, only to unwrap functorch's tensors, and costs a tiny call 3 %.
apply = super(torch.autograd.Function, Function).apply


def compute(
    x: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    call: _Call,
    packed: torch.Tensor,
    *scales: torch.Tensor,
    run: Callable[..., Any] = _library.call,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale, p, dtype, backend, quant_type, block_size, N, K = call
    rows = _calls.rows(x, K, dtype)
    y, s = run(FWD, backend, rows, packed, [*scales], quant_type, block_size, N, a, b, bias, lora_bias, scale, p, seed)
    return _calls.shaped(y, x.shape[:-1]), s
