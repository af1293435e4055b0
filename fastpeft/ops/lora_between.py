"""``y = x Wᵀ + bias + scale · (between(drop(x) Aᵀ) Bᵀ + lora_bias)``: LoRA with a function of rank space inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastpeft import dispatch
from fastpeft.ops import _calls, _checks, _derivatives, _library

_OP = "lora_between"
_FWD = "lora_between_fwd"
_BWD = "lora_between_bwd"


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


def _fake_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    ds: torch.Tensor,
    a: torch.Tensor,
    p: float,
    seed: torch.Tensor | None,
    need_dx: bool,
    need_da: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        dy.new_empty(dy.shape[0], w.shape[1]) if need_dx else dy.new_empty(0),
        a.new_empty(a.shape) if need_da else a.new_empty(0),
    )


def _describe(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scale: float,
) -> _library.Call:
    return _library.described_linear("lora_between", x, w.shape[0], b.shape[1], 0.0)


def _flops_fwd(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, *_: object) -> int:
    (M, K), N = x.shape, w.shape[0]
    return 2 * M * N * (K + s.shape[1])


def _flops_bwd(
    dy: torch.Tensor, x: object, w: object, ds: object, a: torch.Tensor, p: float, seed: object,
    need_dx: bool, need_da: bool,
) -> int:  # fmt: skip
    (M, N), (R, K) = dy.shape, a.shape
    return 2 * M * K * (N * need_dx + R * (need_dx + need_da))


_library.register(_FWD, _fake_fwd, describe=_describe, flops=_flops_fwd)
_library.register(_BWD, _fake_bwd, flops=_flops_bwd)


class _Shrink(torch.autograd.Function):
    """s = drop(x) aᵀ, and a token that brings dy back here, so that dx is summed once: dy W + mask ∘ (ds a).

    The token has the shape of y and the memory of one element; nothing reads it. Saves x where a gradient reads it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor | None,
        a: torch.Tensor,
        seed: torch.Tensor | None,
        call: tuple[float, torch.dtype, str],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        p, dtype, backend = call
        rows = _calls.rows(x, a.shape[1], dtype)
        s = _library.call("lora_shrink", backend, rows, a, p, seed)
        need_x, need_w, need_a, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_w or need_a else None, w if need_x else None, a if need_x else None, seed)
        ctx.call, ctx.shape, ctx.dtype, ctx.a_like = call, x.shape, x.dtype, (a.shape, a.dtype)
        ctx.weight_dtype = None if w is None else w.dtype
        if w is None or not (need_x or need_w):
            return s
        ctx.set_materialize_grads(False)
        if not (need_x or need_a):
            ctx.mark_non_differentiable(s)
        return s, rows.new_empty(()).expand(rows.shape[0], w.shape[0])

    @staticmethod
    def backward(ctx: Any, ds: torch.Tensor | None, dy: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        x, w, a, seed = ctx.saved_tensors
        p, dtype, backend = ctx.call
        need_dx, need_dw, need_da, *_ = ctx.needs_input_grad
        some = ds if ds is not None else dy
        if some is None:
            return None, None, None, None, None
        run = _derivatives.run if _derivatives.derived(some, None) else _library.call
        M, (R, K) = some.shape[0], ctx.a_like[0]
        a = _derivatives.stand_in(some, ctx.a_like) if a is None else a
        x = some.new_empty(0, dtype=dtype) if x is None else _calls.rows(x, K, dtype)
        # An output that no gradient reached adds zero.
        ds = some.new_zeros(M, R, dtype=dtype) if ds is None else _calls.rows(ds, R, dtype).contiguous()
        da = dx = dw = ds
        if dy is None:
            if need_dx or need_da:
                da, dx = run("lora_grad_a", backend, x, ds, a, p, seed, need_dx, need_da, None)
        else:
            dy = _calls.rows(dy, dy.shape[1], dtype)
            if need_dx or need_da:
                base = a if w is None else w if w.dtype == dtype else w.to(dtype)
                dx, da = run(_BWD, backend, dy, x, base, ds, a, p, seed, need_dx, need_da)
            if need_dw:
                dw = (dy.t() @ x).to(ctx.weight_dtype)
        return (
            _calls.like_input(dx, ctx.shape, ctx.dtype) if need_dx else None,
            dw if need_dw and dy is not None else None,
            da if need_da else None,
            None,
            None,
        )


class _Expand(torch.autograd.Function):
    """y from h, beside x wᵀ if there is a base; saves h and b. The token passes dy back unchanged."""

    @staticmethod
    def forward(
        ctx: Any,
        token: torch.Tensor | None,
        x: torch.Tensor | None,
        w: torch.Tensor | None,
        h: torch.Tensor,
        b: torch.Tensor,
        bias: torch.Tensor | None,
        lora_bias: torch.Tensor | None,
        call: tuple[float, str],
    ) -> torch.Tensor:
        scale, backend = call
        if w is None:
            y: torch.Tensor = _library.call("lora_expand", backend, h, b, bias, lora_bias, scale)
        else:
            y = _library.call(_FWD, backend, x, w, h, b, bias, lora_bias, scale)
        need_dh, need_db = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(h if need_db else None, b if need_dh else None)
        ctx.call, ctx.b_like = call, (b.shape, b.dtype)
        ctx.bias_dtypes = (None if bias is None else bias.dtype, None if lora_bias is None else lora_bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, b = ctx.saved_tensors
        scale, backend = ctx.call
        need_token, _, _, need_dh, need_db, need_bias, need_lora_bias, _ = ctx.needs_input_grad
        run = _derivatives.run if _derivatives.derived(dy, None) else _library.call
        rows = _calls.rows(dy, dy.shape[1], dy.dtype)
        b = _derivatives.stand_in(rows, ctx.b_like) if b is None else b
        h = rows.new_empty(0) if h is None else h.contiguous()
        dh = db = sums = rows
        if need_dh or need_db or need_bias or need_lora_bias:
            dh, db, sums = run("lora_grad_b", backend, rows, h, b, scale, need_db, need_bias or need_lora_bias, None)
        return (
            dy if need_token else None,
            None,
            None,
            dh if need_dh else None,
            db if need_db else None,
            sums.to(ctx.bias_dtypes[0]) if need_bias else None,
            (sums * scale).to(ctx.bias_dtypes[1]) if need_lora_bias else None,
            None,
        )


def _check(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    dropout: float,
) -> None:
    _checks.activation(_OP, x)
    _checks.matrix(_OP, "lora_A", lora_A, (None, None), "[rank, in_features]")
    _checks.entrance(_OP, x, "lora_A", lora_A.shape[1], lora_A.device)
    _checks.require(lora_A.shape[0] >= 1, _OP, "lora_A", "have a rank of at least 1", 0)
    if weight is not None:
        _checks.matrix(_OP, "weight", weight, (None, x.shape[-1]), "[out_features, in_features]")
    _checks.matrix(_OP, "lora_B", lora_B, (None if weight is None else weight.shape[0], None), "[out_features, rank]")
    _checks.vector(_OP, "bias", bias, lora_B.shape[0], "out_features")
    _checks.vector(_OP, "lora_bias", lora_bias, lora_B.shape[0], "out_features")
    _checks.same_device(_OP, x.device, lora_A=lora_A, lora_B=lora_B, weight=weight, bias=bias, lora_bias=lora_bias)
    _checks.probability(_OP, "dropout", dropout)


def lora_between(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    between: Callable[[torch.Tensor], torch.Tensor],
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    scale: float | torch.Tensor = 1.0,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """y = x Wᵀ + bias + scale · (between(drop(x) Aᵀ) Bᵀ + lora_bias)

    x          [..., K]  fp32 | bf16 | fp16 (fp64 with the eager backend), any strides
    lora_A     [R, K]    any float dtype and strides: all rows that read this x, stacked
    between    s [..., R] -> h [..., R'], plain torch: an activation, a gate, dropout on the rank. It may have
               parameters of its own. s and h are half a per cent of the traffic
    lora_B     [N, R']   any float dtype and strides
    weight     [N, K]    in x's dtype outside autocast, or None: the update alone
    bias, lora_bias [N]; scale, dropout, backend    as in lora_linear
    Returns    y [..., N] in x.dtype, under autocast in its dtype
    Saves      x, h, and what ``between`` keeps
    Cost       as lora_linear of the same ranks: x is read once by the shrink and once by the base product
    Raises     ValueError: shape, device, dropout or backend; an h of another shape.  TypeError: dtype.
    """
    _checks.require_dtype(callable(between), _OP, "between", "be a function of s", type(between).__name__)
    _check(x, lora_A, lora_B, weight, bias, lora_bias, dropout)
    cast = _calls.autocast_dtype(x, x.device.type)
    dtype = cast or x.dtype
    if cast is None and weight is not None:
        _checks.require_dtype(weight.dtype == dtype, _OP, "weight", f"have the dtype of x, {dtype}", weight.dtype)
    compiling = torch.compiler.is_compiling()
    scale, lora_B, lora_bias = _calls.fold_scale(_OP, scale, lora_B, lora_bias, compiling)
    seed = _calls.draw_seed(x.device) if dropout else None
    composed = _derivatives.composed(_OP, backend, compiling)
    chosen = "eager" if composed else dispatch.select("lora_shrink", backend, x.device.type, dtype, _OP)
    leading = x.shape[:-1]
    if composed:
        rows = _calls.rows(x, x.shape[-1], dtype)
        s = _derivatives.run("lora_shrink", chosen, rows, lora_A, dropout, seed)
        token = None
    else:
        made = _Shrink.apply(x, weight, lora_A, seed, (dropout, dtype, chosen))
        s, token = made if isinstance(made, tuple) else (made, None)
    h = between(s if len(leading) == 1 else s.view(*leading, s.shape[1]))
    real = isinstance(h, torch.Tensor) and h.is_floating_point() and h.layout is _checks.STRIDED
    got = h.dtype if isinstance(h, torch.Tensor) else type(h).__name__
    _checks.require_dtype(real, _OP, "between", "give a dense floating point tensor", got)
    shape = (*leading, lora_B.shape[1])
    _checks.require(h.shape == shape, _OP, "between", f"give a tensor of shape {list(shape)}", list(h.shape))
    h = _calls.rows(h, lora_B.shape[1], dtype).contiguous()
    base = weight if weight is None or weight.dtype == dtype else weight.detach().to(dtype)
    if composed:
        if weight is None:
            y = _derivatives.run("lora_expand", chosen, h, lora_B, bias, lora_bias, scale)
        else:
            y = _derivatives.run(_FWD, chosen, rows, weight.to(dtype), h, lora_B, bias, lora_bias, scale)
    else:
        given = None if weight is None else _calls.rows(x.detach(), x.shape[-1], dtype)
        y = _Expand.apply(
            token, given, None if base is None else base.detach(), h, lora_B, bias, lora_bias, (scale, chosen)
        )
    return y if len(leading) == 1 else y.view(*leading, lora_B.shape[0])
