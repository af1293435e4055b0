"""``y = x Wᵀ + bias + scale · (drop(x) Aᵀ Bᵀ + lora_bias)``: the operator behind every LoRA on a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastpeft import dispatch
from fastpeft.ops import _calls, _checks, _derivatives, _flops, _library

_FWD = "lora_linear_fwd"
_BWD = "lora_linear_bwd"


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
    return x.new_empty(x.shape[0], w.shape[0]), x.new_empty(x.shape[0], a.shape[0])


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
    need_dx: bool, need_da: bool, need_db: bool, need_bias: bool,
) -> int:  # fmt: skip
    (M, N), (R, K) = dy.shape, a.shape
    return _flops.backward(M, N, K, R, need_dx, need_da, need_db)


_library.register(_FWD, _fake_fwd, describe=_describe)
_library.register(_BWD, _fake_bwd, flops=_flops_bwd)


class _LoRALinear(torch.autograd.Function):
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
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y, s = _forward(x, w, a, b, bias, lora_bias, seed, call)
        need_x, need_w, need_a, need_b, need_bias, need_lora_bias, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_a or need_w else None,
            w if need_x else None,
            a if need_x else None,
            b if need_x or need_a else None,
            s if need_b else None,
            seed,
        )
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
    x, w, a, b, s, seed = ctx.saved_tensors
    scale, p, dtype, backend = ctx.call
    need_dx, need_dw, need_da, need_db, need_bias, need_lora_bias, _, _ = ctx.needs_input_grad
    dy = _calls.rows(dy, dy.shape[-1], dtype)
    # What was not saved is not read; a launcher takes its sizes from the others.
    x = dy.new_empty(0) if x is None else _calls.rows(x, ctx.shape[-1], dtype)
    s = dy.new_empty(0) if s is None else s.contiguous()
    if a is None:
        a = _derivatives.stand_in(dy, ctx.a_like)
        b = _derivatives.stand_in(dy, ctx.b_like) if b is None else b
    w = a if w is None else w if w.dtype == dtype else w.to(dtype)
    dx, da, db, sums = _library.call(
        _BWD, backend, dy, x, w, a, b, s, scale, p, seed,
        need_dx, need_da, need_db, need_bias or need_lora_bias,
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
    )


def _derived(ctx: Any, dy: Any, ds: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The same by the reference's formula, to be differentiated again."""
    x, w, a, b, s, seed = ctx.saved_tensors
    scale, p, dtype, _ = ctx.call
    need_dx, need_dw, need_da, need_db, need_bias, need_lora_bias, _, _ = ctx.needs_input_grad
    with _derivatives.formula(dy, b, ctx.shape, dtype) as dy:
        x = None if x is None else _calls.rows(x, ctx.shape[-1], dtype)
        if a is None:
            a = _derivatives.stand_in(dy, ctx.a_like)
            b = _derivatives.stand_in(dy, ctx.b_like) if b is None else b
        dx, da, db = _derivatives.adapter(dy, ds, x, a, b, s, scale, p, seed, need_dx, need_da, need_db)
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
        )


# Function.apply is Python around this one; it unwraps the tensors of functorch's transforms, and costs a tiny call 3 %.
_apply = super(torch.autograd.Function, _LoRALinear).apply


def _forward(
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
    y, s = run(_FWD, backend, rows, w, a, b, bias, lora_bias, scale, p, seed)
    return _calls.shaped(y, x.shape[:-1]), s


_Given = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", "torch.Tensor | None", float
]
"""x, weight, lora_A, lora_B, bias, lora_bias, dropout."""


def _check(given: _Given) -> None:
    """Word what is wrong; called only when ``_fits`` is False."""
    op = "lora_linear"
    x, weight, lora_A, lora_B, bias, lora_bias, dropout = given
    _checks.activation(op, x)
    _checks.matrix(op, "weight", weight, (None, None), "[out_features, in_features]")
    _checks.matrix(op, "lora_A", lora_A, (None, None), "[rank, in_features]")
    sure = lora_A.shape[1] != x.shape[-1], lora_A.device != x.device
    _checks.entrance(op, x, "weight", weight.shape[1], weight.device, sure=sure)
    _checks.matrix(op, "weight", weight, (None, x.shape[-1]), "[out_features, in_features]")
    _checks.vector(op, "bias", bias, weight.shape[0], "out_features")
    _checks.same_device(op, x.device, weight=weight, bias=bias)
    _checks.adapter(op, x, weight.shape[0], lora_A, lora_B, lora_bias, dropout)


def _fits(given: _Given) -> bool:
    """What ``_check`` asks: one cheap conjunction on the way of every call."""
    x, weight, lora_A, lora_B, bias, lora_bias, dropout = given
    try:
        (N, K), device = weight.shape, x.device
        return (
            x.shape[-1] == K
            and x.dtype in _checks.FLOATS
            and weight.device == device
            and weight.is_floating_point()
            and (bias is None or _checks.vector_fits(bias, N, device))
            and _checks.adapter_fits(K, N, device, lora_A, lora_B, lora_bias, dropout)
        )
    except (*_checks.UNFIT, RuntimeError):  # RuntimeError: a nested x has no shape
        return False


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    *,
    scale: float | torch.Tensor = 1.0,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """y = x Wᵀ + bias + scale · (drop(x) Aᵀ Bᵀ + lora_bias)            Hu et al. 2021, arXiv:2106.09685, eq. 3

    x          [..., K]  fp32 | bf16 | fp16 (fp64 with the eager backend), any strides; or nested (torch.strided)
    weight     [N, K]    dtype of x outside autocast, any strides; frozen or trained
    lora_A     [R, K]    any float dtype and strides; R >= 1
    lora_B     [N, R]    any float dtype and strides
    bias       [N]       of the base layer, or None; lora_bias [N]: of lora_B, multiplied by scale, or None
    scale      float or 0-d tensor, dimensionless: α / r, α / √r, or fixed
    dropout    probability in [0, 1) that an element of x is hidden from A; drawn anew at every call, from a seed that
               torch's generator of x's device gives; realised in steps of 1/65536, and unbiased
    backend    "cpp" | "triton" | "eager", or None for the first that serves
    Returns    y [..., N] in x.dtype, under autocast in its dtype; summed in fp32. Differentiable, any number of
               times, in every tensor but a float scale; gradients of gradients are the reference's
    Saves      x (the caller's own tensor), s = drop(x) Aᵀ [M, R] and the seed; what no gradient needs is not saved
    Cost       2MNK + 2MR(K + N) FLOP forward, 2MNK + 4MR(K + N) backward; x and y are each moved at least once
    Raises     ValueError: shape, device, dropout or backend.  TypeError: dtype.
    """
    given: _Given = (x, weight, lora_A, lora_B, bias, lora_bias, dropout)
    if not _fits(given):
        if isinstance(x, torch.Tensor) and x.is_nested:
            rest: dict[str, Any] = {"scale": scale, "dropout": dropout, "backend": backend}
            return _calls.nested(x, lambda rows: lora_linear(rows, weight, lora_A, lora_B, bias, lora_bias, **rest))
        _check(given)
    device = x.device
    cast = _calls.autocast_dtype(x, device.type)
    dtype = cast or x.dtype
    if cast is None and weight.dtype != dtype:
        rule = f"have the dtype of weight, {weight.dtype}, outside autocast"
        _checks.require_dtype(False, "lora_linear", "x", rule, dtype)
    compiling = torch.compiler.is_compiling()
    if type(scale) is not float or compiling:
        scale, lora_B, lora_bias = _calls.fold_scale("lora_linear", scale, lora_B, lora_bias, compiling)
    seed = _calls.draw_seed(device) if dropout else None
    if _derivatives.composed("lora_linear", backend, compiling):
        call = (scale, dropout, dtype, "eager")
        return _forward(x, weight, lora_A, lora_B, bias, lora_bias, seed, call, _derivatives.run)[0]
    chosen = dispatch.select(_FWD, backend, device.type, dtype, "lora_linear")
    args = (x, weight, lora_A, lora_B, bias, lora_bias, seed, (scale, dropout, dtype, chosen))
    if not torch.is_grad_enabled():
        return _forward(*args)[0]
    if compiling:
        return _LoRALinear.apply(*args)
    y = _apply(*args)
    return y[0] if type(y) is tuple else y
