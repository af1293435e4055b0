"""``y = conv(x, W) + bias + scale · (conv1x1(conv(drop(x), A), B) + lora_bias)`` in one to three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastpeft import dispatch
from fastpeft.ops import _calls, _checks, _derivatives
from fastpeft.ops._geometry import Geometry, resolve, rows_of
from fastpeft.ops._lora_conv import Call, LoRAConv, composed, forward, is_cheaper, true_fp32

PATHS = ("auto", "accumulate", "merged")


def _check(
    op: str,
    D: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    groups: int,
    dropout: float,
) -> None:
    """Raise the error for what is wrong; called only when the quick test has failed."""
    _checks.activation(op, x)
    sizes = "*in" if D == 1 else f"*in (of {D} dimensions)"
    _checks.require(x.dim() in (D + 1, D + 2), op, "x", f"have shape [N, C, {sizes}] or [C, {sizes}]", list(x.shape))
    _checks.require_dtype(type(groups) is int, op, "groups", "be an int", repr(groups))
    C = x.shape[-D - 1]
    _checks.require(groups >= 1 and C % groups == 0, op, "groups", f"divide the {C} channels of x", groups)
    _checks.dense(op, "weight", weight)
    fits = weight.dim() == D + 2 and weight.shape[1] == C // groups and weight.shape[0] % groups == 0
    want = f"have shape [out, in / groups, *kernel] = [a multiple of {groups}, {C // groups}, any × {D}]"
    _checks.require(fits, op, "weight", want, list(weight.shape))
    N, K = weight.shape[0], weight.shape[1:].numel()
    _checks.vector(op, "bias", bias, N, "out_channels")
    _checks.same_device(op, x.device, weight=weight, bias=bias)
    _checks.dense(op, "lora_A", lora_A)
    flat = lora_A.dim() >= 1 and lora_A.shape[1:] in ((K,), weight.shape[1:])
    want = f"have shape [rank, in / groups · kernel] = [any, {K}], or [rank, in / groups, *kernel]"
    _checks.require(flat, op, "lora_A", want, list(lora_A.shape))
    _checks.adapter(op, weight.flatten(1), N, lora_A.flatten(1), lora_B, lora_bias, dropout)
    _checks.require_dtype(lora_A.is_floating_point(), op, "lora_A", "be a floating point tensor", lora_A.dtype)


def _lora_conv(
    op: str,
    D: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    stride: object,
    padding: object,
    dilation: object,
    groups: int,
    padding_mode: str,
    scale: float | torch.Tensor,
    dropout: float,
    path: str,
    backend: str | None,
) -> torch.Tensor:
    _check(op, D, x, weight, lora_A, lora_B, bias, lora_bias, groups, dropout)
    _checks.one_of(op, "path", path, PATHS)
    cast = _calls.autocast_dtype(x, x.device.type)
    dtype = cast or x.dtype
    if cast is None:
        _checks.require_dtype(weight.dtype == dtype, op, "weight", f"have the dtype of x, {dtype}", weight.dtype)
    batched = x.dim() == D + 2
    kernel = list(weight.shape[2:])
    x, geometry = resolve(op, x if batched else x.unsqueeze(0), kernel, stride, padding, dilation, groups, padding_mode)
    compiling = torch.compiler.is_compiling()
    scale, lora_B, lora_bias = _calls.fold_scale(op, scale, lora_B, lora_bias, compiling)
    lora_A = lora_A.reshape(lora_A.shape[0], *weight.shape[1:])
    if D == 1:  # a line is an image of one row
        x, weight, lora_A = x.unsqueeze(2), weight.unsqueeze(2), lora_A.unsqueeze(2)
        geometry = Geometry([1, *geometry.stride], [0, *geometry.padding], [1, *geometry.dilation], groups)
    _checks.require(path != "merged" or not dropout, op, "path", "be another where dropout is not 0", "'merged'")
    seed = _calls.draw_seed(x.device) if dropout else None
    inside = _derivatives.composed(op, backend, compiling)
    chosen = "eager" if inside else dispatch.select("conv_shrink", backend, x.device.type, dtype, op)
    merged = path == "merged"
    if path == "auto" and dtype == torch.float32 and cast is None and not dropout and chosen != "eager":
        merged = true_fp32(x.device.type) and is_cheaper(rows_of(x, weight, geometry), weight)
    args = (x, weight, lora_A, lora_B, bias, lora_bias, seed, Call(op, geometry, scale, dropout, dtype, merged, chosen))
    if inside:
        y = composed(*args)
    elif torch.is_grad_enabled():
        y = LoRAConv.apply(*args)
        y = y[0] if type(y) is tuple else y
    else:
        y = forward(*args)[0]
    if D == 1:
        y = y.squeeze(2)
    return y if batched else y.squeeze(0)


def lora_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    scale: float | torch.Tensor = 1.0,
    dropout: float = 0.0,
    path: str = "auto",
    backend: str | None = None,
) -> torch.Tensor:
    """y = conv(x, W) + bias + scale · (conv1x1(conv(drop(x), A), B) + lora_bias)     arXiv:2106.09685, eq. 3, with
    ΔW = scale · (B A) in W's shape: A is a convolution to R channels, B one of 1 × 1; groups share A

    x          [N, C, H, W] or [C, H, W]  fp32 | bf16 | fp16 (fp64 with the eager backend); channels-last is fastest
    weight     [O, C / groups, kh, kw]  dtype of x outside autocast; frozen or trained
    lora_A     [R, C / groups · kh · kw] or [R, C / groups, kh, kw]  any float dtype and strides; R >= 1
    lora_B     [O, R]  any float dtype and strides
    bias       [O]  of the base layer, or None; lora_bias [O]: of lora_B, multiplied by scale, or None
    stride, padding, dilation, groups    as in torch.nn.functional.conv2d, padding also "same" or "valid"
    padding_mode    "zeros" | "reflect" | "replicate" | "circular": what padding is filled with
    scale      float or 0-d tensor, dimensionless: α / r, α / √r, or fixed
    dropout    probability in [0, 1) that an element of x is hidden from A, in every window that holds it; as in
               lora_linear. With padding other than zeros each padded copy is dropped on its own.
    path       "accumulate": base product and rank-R product apart · "merged": one product with W + ΔW, rounded to W's
               dtype, without dropout · "auto": merged where that is exact and cheaper: in true fp32 (on CUDA where
               torch.backends.cudnn.allow_tf32 is False), outside autocast, at dropout 0, for enough rows
    backend    "cpp" | "triton" | "eager", or None for the first that serves
    Returns    y in x.dtype, under autocast in its dtype, in the memory format that torch's conv2d gives.
               Differentiable, any number of times, in every tensor but a float scale
    Saves      x (the caller's own tensor; its padded copy where torch makes one), s [N · out, groups · R] and the seed;
               what no gradient needs is not saved, and merged no s
    Cost       beyond the base: 2MR(K + O) FLOP forward, twice that backward, M = N · out, K = C / groups · kh · kw;
               y, x and dx are each moved once more
    Raises     ValueError: shape, geometry, device, dropout, path or backend.  TypeError: dtype.
    """
    return _lora_conv(
        "lora_conv2d", 2, x, weight, lora_A, lora_B, bias, lora_bias, stride, padding, dilation, groups, padding_mode,
        scale, dropout, path, backend,
    )  # fmt: skip


def lora_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    scale: float | torch.Tensor = 1.0,
    dropout: float = 0.0,
    path: str = "auto",
    backend: str | None = None,
) -> torch.Tensor:
    """lora_conv2d in one dimension: x [N, C, L] or [C, L], weight [O, C / groups, *kernel]."""
    return _lora_conv(
        "lora_conv1d", 1, x, weight, lora_A, lora_B, bias, lora_bias, stride, padding, dilation, groups, padding_mode,
        scale, dropout, path, backend,
    )  # fmt: skip


def lora_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    scale: float | torch.Tensor = 1.0,
    dropout: float = 0.0,
    path: str = "auto",
    backend: str | None = None,
) -> torch.Tensor:
    """lora_conv2d in three dimensions: x [N, C, D, H, W] or [C, D, H, W], weight [O, C / groups, *kernel]."""
    return _lora_conv(
        "lora_conv3d", 3, x, weight, lora_A, lora_B, bias, lora_bias, stride, padding, dilation, groups, padding_mode,
        scale, dropout, path, backend,
    )  # fmt: skip
