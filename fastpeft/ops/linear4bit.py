"""A linear layer over a 4-bit weight, with and without a LoRA adapter; W is dequantised on the fly, never stored."""

from __future__ import annotations

from typing import Any

import torch

from fastpeft import dispatch
from fastpeft.ops import _calls, _checks, _derivatives, _flops, _library
from fastpeft.ops._linear4bit import BWD, FWD, Function, apply, compute
from fastpeft.ops.weight4bit import Weight4bit, blocks_of


def _fake_fwd(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: list[torch.Tensor],
    quant_type: str,
    block_size: int,
    N: int,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scale: float,
    p: float,
    seed: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape[0], N)
    if a is None:
        return y, x.new_empty(0)
    return y, x.new_empty(x.shape[0], a.shape[0], dtype=_library.rank_dtype(x.dtype, backend))


def _fake_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: list[torch.Tensor],
    quant_type: str,
    block_size: int,
    K: int,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
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
    da, db = (
        dy.new_empty(0) if t is None else t.new_empty(t.shape if n else 0) for t, n in ((a, need_da), (b, need_db))
    )
    dx = dy.new_empty(dy.shape[0], K) if need_dx else dy.new_empty(0)
    return dx, da, db, dy.new_empty(dy.shape[1] if need_bias else 0, dtype=torch.promote_types(dy.dtype, torch.float32))


def _describe(
    x: torch.Tensor, packed: torch.Tensor, scales: list[torch.Tensor], quant_type: str, block_size: int, N: int,
    a: torch.Tensor | None, b: object, bias: object, lora_bias: object, scale: float, p: float, seed: object,
) -> _library.Call:  # fmt: skip
    rank, name = (0, "linear4bit") if a is None else (a.shape[0], "linear4bit_lora")
    blocks = blocks_of(quant_type, block_size, len(scales) == 4)
    return _library.described_linear(name, x, N, rank, p, strategy=blocks)


def _flops_bwd(
    dy: torch.Tensor, x: object, packed: object, scales: object, quant_type: str, block_size: int, K: int,
    a: torch.Tensor | None, b: object, s: object, scale: float, p: float, seed: object,
    need_dx: bool, need_da: bool, need_db: bool, need_bias: bool,
) -> int:  # fmt: skip
    (M, N), rank = dy.shape, 0 if a is None else a.shape[0]
    return _flops.backward(M, N, K, rank, need_dx, need_da, need_db)


_library.register(FWD, _fake_fwd, describe=_describe)
_library.register(BWD, _fake_bwd, flops=_flops_bwd)


_Adapter = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None", float]
"""lora_A, lora_B, lora_bias, dropout."""


def _check(
    op: str, x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None, adapter: _Adapter | None = None
) -> None:
    """Raise the error for what is wrong; called only when ``_fits`` is False."""
    _checks.activation(op, x)
    _checks.require_dtype(isinstance(weight, Weight4bit), op, "weight", "be a Weight4bit", type(weight).__name__)
    shape, names = list(weight.shape), "have shape [out_features, in_features]"
    _checks.require(len(shape) == 2, op, "weight", names, shape)
    weight.check(op)
    sure = True, True
    if adapter is not None:
        _checks.matrix(op, "lora_A", adapter[0], (None, None), "[rank, in_features]")
        sure = adapter[0].shape[1] != x.shape[-1], adapter[0].device != x.device
    _checks.entrance(op, x, "weight", shape[1], weight.device, sure=sure)
    _checks.require(shape[1] == x.shape[-1], op, "weight", f"{names} = [any, {x.shape[-1]}]", shape)
    N = shape[0]
    _checks.vector(op, "bias", bias, N, "out_features")
    _checks.same_device(op, x.device, weight=weight.packed, bias=bias)
    if adapter is not None:
        _checks.adapter(op, x, N, *adapter)


def _fits(x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None, adapter: _Adapter | None = None) -> bool:
    """Same tests as ``_check``, returning a bool; a kernel relies on the sizes of the weight's parts."""
    try:
        (N, K), device = weight.shape, x.device
        return (
            x.shape[-1] == K
            and x.dtype in _checks.FLOATS
            and x.layout is _checks.STRIDED
            and weight.sound()
            and weight.packed.device == device
            and (bias is None or _checks.vector_fits(bias, N, device))
            and (adapter is None or _checks.adapter_fits(K, N, device, *adapter))
        )
    except _checks.UNFIT:
        return False


def _run(
    op: str,
    x: torch.Tensor,
    weight: Weight4bit,
    adapter: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    bias: torch.Tensor | None,
    scale: float,
    dropout: float,
    backend: str | None,
    compiling: bool,
) -> torch.Tensor:
    device = x.device
    dtype = _calls.autocast_dtype(x, device.type) or x.dtype
    seed = _calls.draw_seed(device) if dropout else None
    N, K = weight.shape
    composed = _derivatives.composed(op, backend, compiling)
    chosen = "eager" if composed else dispatch.select(FWD, backend, device.type, dtype, op)
    a, b, lora_bias = adapter
    call = (scale, dropout, dtype, chosen, weight.quant_type, weight.block_size, N, K)
    packed = weight.packed
    if composed and not compiling:
        packed = packed.as_subclass(torch.Tensor)  # tracers (torch.func.linearize) know no subclass
    args: Any = (x, a, b, bias, lora_bias, seed, call, packed, *weight.scales)
    if composed:
        return compute(*args, run=_derivatives.run)[0]
    if not torch.is_grad_enabled():
        return compute(*args)[0]
    if compiling:
        return Function.apply(*args)
    y = apply(*args)
    return y[0] if type(y) is tuple else y


def linear4bit(
    x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """y = x Wᵀ + bias                                                     Dettmers et al. 2023, arXiv:2305.14314, eq. 5

    x          [..., K]  fp32 | bf16 | fp16 (fp64 with the eager backend), any strides
    weight     Weight4bit of shape [N, K]; frozen
    bias       [N] of any float dtype, or None
    backend    "cpp" | "cuda" | "triton" | "eager", or None for the first that serves
    Returns    y [..., N] in x.dtype, under autocast in its dtype; W rounded to that dtype, summed in fp32.
               Differentiable, any number of times, in x and bias.
    Saves      nothing but the packed weight
    Cost       2MNK FLOP and one dequantisation each way; x and y are each moved at least once
    Raises     ValueError: shape, device or backend.  TypeError: dtype.
    """
    op = "linear4bit"
    if not _fits(x, weight, bias):
        _check(op, x, weight, bias)
    return _run(op, x, weight, (None, None, None), bias, 1.0, 0.0, backend, torch.compiler.is_compiling())


def linear4bit_lora(
    x: torch.Tensor,
    weight: Weight4bit,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    *,
    scale: float | torch.Tensor = 1.0,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """y = x Wᵀ + bias + scale · (drop(x) Aᵀ Bᵀ + lora_bias)               Dettmers et al. 2023, arXiv:2305.14314, eq. 5

    weight     Weight4bit of shape [N, K]; frozen
    x, lora_A, lora_B, bias, lora_bias, scale, dropout, backend    as in ``lora_linear``; bias of any float dtype
    Returns    y [..., N] in x.dtype, under autocast in its dtype; W rounded to that dtype, summed in fp32.
               Differentiable, any number of times, in every tensor but the weight and a float scale; gradients of
               gradients are the reference's
    Saves      x (the caller's own tensor), s = drop(x) Aᵀ [M, R], the seed and the packed weight; what no gradient
               needs is not saved
    Cost       2MNK + 2MR(K + N) FLOP forward, 2MNK + 4MR(K + N) backward, and one dequantisation each way
    Raises     ValueError: shape, device, dropout or backend.  TypeError: dtype.
    """
    op = "linear4bit_lora"
    adapter = lora_A, lora_B, lora_bias, dropout
    if not _fits(x, weight, bias, adapter):
        _check(op, x, weight, bias, adapter)
    compiling = torch.compiler.is_compiling()
    if type(scale) is not float or compiling:
        scale, lora_B, lora_bias = _calls.fold_scale(op, scale, lora_B, lora_bias, compiling)
    return _run(op, x, weight, (lora_A, lora_B, lora_bias), bias, scale, dropout, backend, compiling)
