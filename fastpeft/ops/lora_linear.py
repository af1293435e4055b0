"""``y = x Wᵀ + bias + scale · (drop(x) Aᵀ Bᵀ + lora_bias)``: the operator behind every LoRA on a linear layer."""

from __future__ import annotations

from typing import Any

import torch

from fastpeft import dispatch
from fastpeft.ops import _calls, _checks, _derivatives, _lora_linear


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    dropout: float,
) -> None:
    """Raise the error for what is wrong; called only when ``_fits`` is False."""
    op = "lora_linear"
    _checks.activation(op, x)
    _checks.matrix(op, "weight", weight, (None, None), "[out_features, in_features]")
    _checks.matrix(op, "lora_A", lora_A, (None, None), "[rank, in_features]")
    sure = lora_A.shape[1] != x.shape[-1], lora_A.device != x.device
    _checks.entrance(op, x, "weight", weight.shape[1], weight.device, sure=sure)
    _checks.matrix(op, "weight", weight, (None, x.shape[-1]), "[out_features, in_features]")
    _checks.vector(op, "bias", bias, weight.shape[0], "out_features")
    _checks.same_device(op, x.device, weight=weight, bias=bias)
    _checks.adapter(op, x, weight.shape[0], lora_A, lora_B, lora_bias, dropout)


def _fits(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    dropout: float,
) -> bool:
    """Same tests as ``_check`` in one cheap conjunction, as they run at every call."""
    try:
        (N, K), device = weight.shape, x.device
        return (
            x.shape[-1] == K
            and x.dtype in _checks.FLOATS
            and weight.device == device
            and weight.is_floating_point()
            and x.layout is _checks.STRIDED is weight.layout
            and (bias is None or _checks.vector_fits(bias, N, device))
            and _checks.adapter_fits(K, N, device, lora_A, lora_B, lora_bias, dropout)
        )
    except _checks.UNFIT:
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
    masks: _derivatives.Masks = None,
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
               torch's generator of x's device gives; realised in steps of 1/32768, and unbiased
    masks      bits of A [R, ceil(K / 8)] and of Bᵀ [R, ceil(N / 8)], uint8, lowest first, either may be None: a
               gradient is zero where its bit is. A and B are read without the masks, so they must hold zeros there
    backend    "cpp" | "triton" | "eager", or None for the first that serves
    Returns    y [..., N] in x.dtype, under autocast in its dtype; summed in fp32. Differentiable, any number of
               times, in every tensor but a float scale; gradients of gradients are the reference's
    Saves      x (the caller's own tensor), s = drop(x) Aᵀ [M, R] and the seed; what no gradient needs is not saved
    Cost       2MNK + 2MR(K + N) FLOP forward, 2MNK + 4MR(K + N) backward; x and y are each moved at least once
    Raises     ValueError: shape, device, dropout or backend.  TypeError: dtype.
    """
    if not _fits(x, weight, lora_A, lora_B, bias, lora_bias, dropout):
        if isinstance(x, torch.Tensor) and x.is_nested and x.layout is _checks.STRIDED:
            rest: dict[str, Any] = {"scale": scale, "dropout": dropout, "masks": masks, "backend": backend}
            return _calls.nested(x, lambda rows: lora_linear(rows, weight, lora_A, lora_B, bias, lora_bias, **rest))
        _check(x, weight, lora_A, lora_B, bias, lora_bias, dropout)
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
    if masks is not None:
        _checks.masks("lora_linear", masks, lora_A, lora_B)
    if _derivatives.composed("lora_linear", backend, compiling):
        if masks is not None:
            lora_A, lora_B = _derivatives.masked(lora_A, lora_B, *masks)
        call = (scale, dropout, dtype, "eager")
        return _lora_linear.forward(x, weight, lora_A, lora_B, bias, lora_bias, seed, call, _derivatives.run)[0]
    chosen = dispatch.select(_lora_linear.FWD, backend, device.type, dtype, "lora_linear")
    args: tuple[Any, ...] = (x, weight, lora_A, lora_B, bias, lora_bias, seed, (scale, dropout, dtype, chosen))
    if not torch.is_grad_enabled():
        return _lora_linear.forward(*args)[0]
    if masks is not None:
        args += tuple(masks)
    if compiling:
        return _lora_linear.Function.apply(*args)
    y = _lora_linear.apply(*args)
    return y[0] if type(y) is tuple else y
