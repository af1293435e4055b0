"""A convolution with an adapter, and its gradients: the vendor's base convolution and the primitives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from fastpeft.ops import _derivatives, _library
from fastpeft.ops._geometry import Geometry, rows_of

Run = Callable[..., Any]
"""launcher, backend and arguments: `_library.launch`, or `_derivatives.run`."""


class Call(NamedTuple):
    op: str
    geometry: Geometry
    scale: float
    p: float
    dtype: torch.dtype
    merged: bool
    backend: str


# From this many elements per image on, torch transposes a matrix in blocks.
_BLOCKED = 60 * 60


def _is_blocked(x: torch.Tensor) -> bool:
    """Whether to transpose images one by one: on a CPU torch's own change of format takes three times as long."""
    alone = not (torch.compiler.is_compiling() or torch.is_grad_enabled())
    return alone and x.device.type == "cpu" and x.shape[1:].numel() >= _BLOCKED


def _last(x: torch.Tensor) -> torch.Tensor:
    """x in channels-last format, the fastest for vendors and our kernels; x itself if it is in that format already."""
    to = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if x.is_contiguous(memory_format=to) or not (x.is_contiguous() and _is_blocked(x)):
        return x.contiguous(memory_format=to)
    out = x.new_empty(x.shape[0], x.shape[2:].numel(), x.shape[1])
    for image, turned in zip(x, out, strict=True):
        turned.copy_(image.flatten(1).t())
    return out.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)


def _first(x: torch.Tensor) -> torch.Tensor:
    """x, channels-last, in torch's contiguous format."""
    if x.is_contiguous() or not _is_blocked(x):
        return x.contiguous()
    out = x.new_empty(x.shape)
    for image, turned in zip(x.movedim(1, -1).flatten(1, -2), out.flatten(2), strict=True):
        turned.copy_(image.t())
    return out


def _empty_last(like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return like.new_empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _is_last(x: torch.Tensor) -> bool:
    return x.stride(1) == 1 and not x.is_contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[N, C, *in] channels-last -> [N · in, C], a view."""
    return x.movedim(1, -1).view(-1, x.shape[1])


def _conv(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry) -> torch.Tensor:
    stride, padding, dilation, groups = geometry
    return _last((F.conv2d if x.dim() == 4 else F.conv3d)(x, w, bias, stride, padding, dilation, groups))


def _added(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """W + scale · B A, summed in fp32 and rounded once."""
    wide = torch.promote_types(w.dtype, torch.float32)
    delta = (b.to(wide) @ a.flatten(1).to(wide)).view(w.shape)
    return torch.add(w.to(wide), delta, alpha=scale).to(dtype)


def _bias(
    bias: torch.Tensor | None, lora_bias: torch.Tensor | None, scale: float, dtype: torch.dtype
) -> torch.Tensor | None:
    if lora_bias is None:
        return None if bias is None else bias.to(dtype)
    return (lora_bias * scale if bias is None else torch.add(bias, lora_bias, alpha=scale)).to(dtype)


def _grouped(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """[M, groups · width] -> [groups, M, width], a view."""
    return rows.unflatten(1, (groups, -1)).transpose(0, 1)


def _expand(y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, call: Call) -> None:
    """y [M, N] += scale · s bᵀ in place, each group of outputs from its own ranks."""
    groups = call.geometry.groups
    if groups == 1:
        _library.launch("lora_expand_add", call.backend, y, s, b, call.scale)
    else:
        b = b.to(y.dtype).unflatten(0, (groups, -1)).transpose(1, 2)
        if torch.compiler.is_compiling():  # a graph cannot write into a view of this kind
            y.add_(torch.bmm(_grouped(s, groups), b).transpose(0, 1).flatten(1), alpha=call.scale)
        else:
            _grouped(y, groups).baddbmm_(_grouped(s, groups), b, alpha=call.scale)


def _grad_b(
    run: Run, dy: torch.Tensor, s: torch.Tensor, b: torch.Tensor, call: Call, need_db: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ds [M, groups · R], db [N, R] and the bias gradient [N] from dy [M, N]."""
    groups = call.geometry.groups
    if groups == 1:
        ds, db, sums = run("lora_grad_b", call.backend, dy, s, b, call.scale, need_db, need_bias, None)
        return ds, db, sums
    parts = _grouped(dy, groups)
    ds = torch.bmm(parts, b.to(dy.dtype).unflatten(0, (groups, -1))) * call.scale
    db = b
    if need_db:
        db = (torch.bmm(parts.transpose(1, 2), _grouped(s, groups)) * call.scale).to(b.dtype).flatten(0, 1)
    sums = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)) if need_bias else dy
    return ds.transpose(0, 1).flatten(1), db, sums


class LoRAConv(torch.autograd.Function):
    """Saves what the needed gradients read; the mask is drawn again from the seed, no window is ever written."""

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
        call: Call,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y, s = forward(x, w, a, b, bias, lora_bias, seed, call)
        need = ctx.needs_input_grad
        # A merged forward has no s: backward computes it from x and A.
        again = need[3] and s is None
        keep_x, keep_a = need[1] or need[2] or again, need[0] or again
        ctx.save_for_backward(
            x if keep_x else None,
            w if need[0] else None,
            a if keep_a else None,
            b if need[0] or need[2] else None,
            s if need[3] else None,
            seed,
        )
        ctx.call, ctx.shape, ctx.dtype, ctx.last = call, x.shape, x.dtype, _is_last(x)
        ctx.likes = tuple((t.shape, t.dtype) for t in (w, a, b))
        ctx.out = y.shape
        ctx.bias_dtypes = (None if bias is None else bias.dtype, None if lora_bias is None else lora_bias.dtype)
        if s is not None and need[3] and not (keep_x and keep_a) and _derivatives.linked(need[0], need[1], need[2]):
            ctx.set_materialize_grads(False)
            return y, s
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, ds: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        if not _derivatives.derived(dy, ds):
            assert dy is not None
            return _backward(ctx, dy, None, _library.launch)
        some: Any = ds if dy is None else dy
        with torch.autocast(some.device.type, enabled=False):
            dy = some.new_zeros(ctx.out, dtype=ctx.call.dtype) if dy is None else dy
            return _backward(ctx, dy, ds, _derivatives.run)


def _backward(ctx: Any, dy: torch.Tensor, through_s: torch.Tensor | None, run: Run) -> tuple[torch.Tensor | None, ...]:
    """The gradients by the launchers, or by the reference's formula if they are to be differentiated again."""
    x, w, a, b, s, seed = ctx.saved_tensors
    call: Call = ctx.call
    stride, padding, dilation, groups = call.geometry
    need_dx, need_dw, need_da, need_db, need_bias, need_lora_bias, *_ = ctx.needs_input_grad
    dy = _last(dy.to(call.dtype))
    kept, again = x is not None, a is not None and (s is None or run is not _library.launch)
    # An unsaved tensor is not read, but the vendor needs its shape and memory format, which no expanded view has.
    w, a, b = (
        _derivatives.stand_in(dy, like) if t is None else t for t, like in zip((w, a, b), ctx.likes, strict=True)
    )
    x = _last(x.to(call.dtype)) if kept else _empty_last(dy, ctx.shape)
    if need_db and kept and again:
        s = run("conv_shrink", call.backend, x, a, *call.geometry, call.p, seed)
    ds, db, sums = _grad_b(
        run, _rows(dy), dy.new_empty(0) if s is None else s.contiguous(), b, call, need_db, need_bias or need_lora_bias
    )
    ds = ds if through_s is None else ds + through_s
    dx = dw = da = None
    if need_dx or need_dw:
        base = _added(w, a, b, call.scale, call.dtype) if call.merged else w.to(call.dtype)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, base, None, stride, padding, dilation, False, [0] * len(stride), groups, [need_dx, need_dw, False]
        )
    add_dx = need_dx and not call.merged
    dx = None if dx is None else _last(dx)
    if add_dx or need_da:
        target = dx if add_dx else dy.new_empty(0)
        da = run("conv_grad_a", call.backend, x, ds, a, target, *call.geometry, call.p, seed, add_dx, need_da)
    if dx is not None:
        dx = (dx if ctx.last else _first(dx)).to(ctx.dtype)
    return (
        dx,
        None if dw is None else dw.to(w.dtype),
        da if need_da else None,
        db if need_db else None,
        sums.to(ctx.bias_dtypes[0]) if need_bias else None,
        (sums * call.scale).to(ctx.bias_dtypes[1]) if need_lora_bias else None,
        None,
        None,
    )


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    call: Call,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y in the memory format of torch's convolution, and s if there is one."""
    last = _is_last(x) or _is_last(w)
    x, start = _last(x.to(call.dtype)), _bias(bias, lora_bias, call.scale, call.dtype)
    _library.tell(call.op, call.backend, x, w, a, b, call)
    s = None
    if call.merged:
        y = _conv(x, _added(w, a, b, call.scale, call.dtype), start, call.geometry)
    else:
        y = _conv(x, w.to(call.dtype), start, call.geometry)
        s = _library.launch("conv_shrink", call.backend, x, a, *call.geometry, call.p, seed)
        _expand(_rows(y), s, b, call)
    return y if last else _first(y), s


def composed(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    call: Call,
) -> torch.Tensor:
    """The same result from torch's own operations, none in place, for every transform and tracer."""
    x, groups, dtype = x.to(call.dtype), call.geometry.groups, call.dtype
    stride, padding, dilation, _ = call.geometry
    conv = F.conv2d if x.dim() == 4 else F.conv3d
    y = conv(x, w.to(dtype), _bias(bias, lora_bias, call.scale, dtype), stride, padding, dilation, groups)
    s = _derivatives.run("conv_shrink", "eager", x, a, *call.geometry, call.p, seed)
    update = torch.bmm(_grouped(s, groups), b.to(dtype).unflatten(0, (groups, -1)).transpose(1, 2)).transpose(0, 1)
    return y + (update * call.scale).reshape(y.movedim(1, -1).shape).movedim(-1, 1)


def _describe(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, call: Call) -> _library.Call:
    M, K = rows_of(x, w, call.geometry), w.shape[1:].numel()
    N, R, groups = b.shape[0], a.shape[0], call.geometry.groups
    base, thin = 2 * M * N * K, 2 * N * R * K if call.merged else 2 * M * R * (groups * K + N)
    return _library.described(
        call.op, x, flop=base + thin, elements=x.numel() + w.numel() + M * N, p=call.p, M=M, K=K, N=N, rank=R,
        groups=groups, strategy="merged: one product with W + ΔW" if call.merged else "accumulate: the rank-R product "
        "is added to the vendor's convolution in place",
    )  # fmt: skip


for _op in ("lora_conv1d", "lora_conv2d", "lora_conv3d"):
    _library.register_composed(_op, _describe)


def true_fp32(device: str) -> bool:
    """Whether the vendor's fp32 convolutions keep the full precision of fp32."""
    if device == "cuda":
        return not torch.backends.cudnn.allow_tf32
    return torch.backends.mkldnn.conv.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]


# Set by hand: torch.compiler.assume_constant_result would import all of Dynamo.
true_fp32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_cheaper(rows: int, w: torch.Tensor) -> bool:
    """Whether two sums W + B A cost less than the rank-R products of y and dx that they save."""
    N, K = w.shape[0], w.shape[1:].numel()
    return rows * (N + K) > 2 * N * K
