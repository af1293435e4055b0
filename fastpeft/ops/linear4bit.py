"""A linear layer over a 4-bit weight, with and without a LoRA adapter; dequantised in passing, never stored."""

from __future__ import annotations

from typing import Any

import torch

from fastpeft import dispatch
from fastpeft.ops import _calls, _checks, _library
from fastpeft.ops.weight4bit import Weight4bit, blocks_of

_FWD = "linear4bit_fwd"
_BWD = "linear4bit_bwd"


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
    return x.new_empty(x.shape[0], N), x.new_empty(0) if a is None else x.new_empty(x.shape[0], a.shape[0])


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
    return dx, da, db, dy.new_empty(dy.shape[1] if need_bias else 0, dtype=torch.float32)


def _describe(
    x: torch.Tensor, packed: torch.Tensor, scales: list[torch.Tensor], quant_type: str, block_size: int, N: int,
    a: torch.Tensor | None, b: object, bias: object, lora_bias: object, scale: float, p: float, seed: object,
) -> _library.Call:  # fmt: skip
    rank, name = (0, "linear4bit") if a is None else (a.shape[0], "linear4bit_lora")
    blocks = blocks_of(quant_type, block_size, len(scales) == 4)
    return _library.described_linear(name, x, N, rank, p, strategy=blocks)


_library.register(_FWD, _fake_fwd, describe=_describe)
_library.register(_BWD, _fake_bwd)

_Call = tuple[float, float, torch.dtype, str, str, int, int, int]
"""scale, p, dtype, backend, quant_type, block_size, N, K."""


class _Linear4bit(torch.autograd.Function):
    """Saves x and s (and the parameters, the weight packed); the mask is drawn and the weight dequantised again."""

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
    ) -> torch.Tensor:
        y, s = _forward(x, a, b, bias, lora_bias, seed, call, packed, *scales)
        need = ctx.needs_input_grad
        # What no gradient asks for is not kept alive: a frozen A saves no x, a frozen B no s.
        ctx.save_for_backward(x if need[1] else None, a, b, s if need[2] else None, seed, packed, *scales)
        ctx.call, ctx.shape, ctx.dtype = call, x.shape, x.dtype
        if need[3] or need[4]:
            ctx.bias_dtypes = (None if bias is None else bias.dtype, None if lora_bias is None else lora_bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # `once` only where a second derivative may be asked for: its no_grad costs a tiny call 5 %.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, a, b, s, seed, packed, *scales = ctx.saved_tensors
    scale, p, dtype, backend, quant_type, block_size, N, K = ctx.call
    need_dx, need_da, need_db, need_bias, need_lora_bias, *_ = ctx.needs_input_grad
    dy = _calls.rows(dy, N, dtype)
    # What was not saved is not read; a launcher takes its sizes from the others.
    x = dy.new_empty(0) if x is None else _calls.rows(x, K, dtype)
    s = dy.new_empty(0) if s is None else s
    dx, da, db, sums = _library.call(
        _BWD, backend, dy, x, packed, scales, quant_type, block_size, K, a, b, s, scale, p, seed,
        need_dx, need_da, need_db, need_bias or need_lora_bias,
    )  # fmt: skip
    return (
        _calls.like_input(dx, ctx.shape, ctx.dtype) if need_dx else None,
        da if need_da else None,
        db if need_db else None,
        sums.to(ctx.bias_dtypes[0]) if need_bias else None,
        (sums * scale).to(ctx.bias_dtypes[1]) if need_lora_bias else None,
        None,
        None,
        None,
        *(None for _ in scales),
    )


_backward_once = _calls.once(_backward)

# Function.apply is Python around this one; it unwraps the tensors of functorch's transforms, and costs a tiny call 3 %.
_apply = super(torch.autograd.Function, _Linear4bit).apply


def _forward(
    x: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    call: _Call,
    packed: torch.Tensor,
    *scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale, p, dtype, backend, quant_type, block_size, N, K = call
    rows = _calls.rows(x, K, dtype)
    y, s = _library.call(
        _FWD, backend, rows, packed, [*scales], quant_type, block_size, N, a, b, bias, lora_bias, scale, p, seed
    )
    return _calls.shaped(y, x.shape[:-1]), s


_Adapter = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None", float]
"""lora_A, lora_B, lora_bias, dropout."""


def _check(
    op: str, x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None, adapter: _Adapter | None = None
) -> None:
    """Word what is wrong; called only when ``_fits`` is False."""
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


def _fits(
    x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None, adapter: _Adapter | None = None
) -> bool:
    """What ``_check`` asks; the sizes of the weight's parts are what a kernel relies on."""
    try:
        (N, K), device = weight.shape, x.device
        return (
            x.shape[-1] == K
            and x.dtype in _checks.FLOATS
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
) -> torch.Tensor:
    device = x.device
    dtype = _calls.autocast_dtype(x, device.type) or x.dtype
    seed = _calls.draw_seed(device) if dropout else None
    chosen = dispatch.select(_FWD, backend, device.type, dtype, op)
    N, K = weight.shape
    a, b, lora_bias = adapter
    call = (scale, dropout, dtype, chosen, weight.quant_type, weight.block_size, N, K)
    args: Any = (x, a, b, bias, lora_bias, seed, call, weight.packed, *weight.scales)
    if not torch.is_grad_enabled() and not _calls.forward_mode():
        return _forward(*args)[0]
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _Linear4bit.apply(*args)
    return _apply(*args)


def linear4bit(
    x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """y = x Wᵀ + bias                                                     Dettmers et al. 2023, arXiv:2305.14314, eq. 5

    x          [..., K]  fp32 | bf16 | fp16 (fp64 with the eager backend), any strides
    weight     Weight4bit of shape [N, K]; frozen
    bias       [N] of any float dtype, or None
    backend    "cpp" | "cuda" | "triton" | "eager", or None for the first that serves
    Returns    y [..., N] in x.dtype, under autocast in its dtype; W rounded to that dtype, summed in fp32.
               Differentiable once in x and bias.
    Saves      nothing but the packed weight
    Cost       2MNK FLOP and one dequantisation each way; x and y are each moved at least once
    Raises     ValueError: shape, device or backend.  TypeError: dtype.
    """
    op = "linear4bit"
    if not _fits(x, weight, bias):
        _check(op, x, weight, bias)
    return _run(op, x, weight, (None, None, None), bias, 1.0, 0.0, backend)


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
               Differentiable once in every tensor but the weight and scale.
    Saves      x (the caller's own tensor), s = drop(x) Aᵀ [M, R], the seed and the packed weight; what no gradient
               needs is not saved
    Cost       2MNK + 2MR(K + N) FLOP forward, 2MNK + 4MR(K + N) backward, and one dequantisation each way
    Raises     ValueError: shape, device, dropout or backend.  TypeError: dtype.
    """
    op = "linear4bit_lora"
    adapter = lora_A, lora_B, lora_bias, dropout
    if not _fits(x, weight, bias, adapter):
        _check(op, x, weight, bias, adapter)
    scale, lora_B, lora_bias = _calls.fold_scale(op, scale, lora_B, lora_bias)
    return _run(op, x, weight, (lora_A, lora_B, lora_bias), bias, scale, dropout, backend)
