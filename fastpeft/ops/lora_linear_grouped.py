"""``y_m = x_m Wᵀ + bias + scale · (drop(x_m) A_tᵀ B_tᵀ + lora_bias_t)`` with t an index for each row."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastpeft import dispatch
from fastpeft.ops import _calls, _checks, _derivatives
from fastpeft.ops.lora_adapter import lora_adapter
from fastpeft.ops.lora_between import lora_between

_OP = "lora_linear_grouped"


def _rows_of(index: torch.Tensor, leading: torch.Size) -> torch.Tensor:
    """``index`` with one value per row, [M]; given in the shape of x's leading dimensions, or as one value for all."""
    if index.numel() == 1:
        return index.reshape(1).expand(leading.numel())
    rule = f"have x's first dimensions, {list(leading)}, or one element"
    _checks.require(index.shape == leading[: index.dim()], _OP, "index", rule, list(index.shape))
    return index.reshape(*index.shape, *[1] * (len(leading) - index.dim())).expand(leading).reshape(-1)


def _check(
    x: torch.Tensor,
    index: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    lora_bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dropout: float,
) -> None:
    _checks.activation(_OP, x)
    _checks.dense(_OP, "index", index)
    integer = not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
    _checks.require_dtype(integer, _OP, "index", "be of an integer dtype", index.dtype)
    for name, value, dims in (("lora_A", lora_A, 3), ("lora_B", lora_B, 3), ("lora_bias", lora_bias, 2)):
        if value is not None or name != "lora_bias":
            _checks.dense(_OP, name, value)
            assert value is not None
            _checks.require(value.dim() == dims, _OP, name, f"have {dims} dimensions", list(value.shape))
            _checks.require_dtype(value.is_floating_point(), _OP, name, "be a floating point tensor", value.dtype)
    T, R, K = lora_A.shape
    _checks.entrance(_OP, x, "lora_A", K, lora_A.device)
    if weight is not None:
        _checks.matrix(_OP, "weight", weight, (None, K), "[out_features, in_features]")
    N = lora_B.shape[1] if weight is None else weight.shape[0]
    _checks.require(weight is not None or bias is None, _OP, "bias", "be None without a weight", "a tensor")
    _checks.vector(_OP, "bias", bias, N, "out_features")
    _checks.require(lora_B.shape == (T, N, R), _OP, "lora_B", f"have shape {[T, N, R]}", list(lora_B.shape))
    _checks.require(T >= 1 and R >= 1, _OP, "lora_A", "have a task and a rank of at least 1", list(lora_A.shape))
    if lora_bias is not None:
        _checks.require(lora_bias.shape == (T, N), _OP, "lora_bias", f"have shape {[T, N]}", list(lora_bias.shape))
    if weight is not None and _calls.autocast_dtype(x, x.device.type) is None:
        _checks.require_dtype(weight.dtype == x.dtype, _OP, "weight", f"have the dtype of x, {x.dtype}", weight.dtype)
    _checks.same_device(_OP, x.device, index=index, lora_A=lora_A, lora_B=lora_B, lora_bias=lora_bias, weight=weight)
    _checks.same_device(_OP, x.device, bias=bias)
    _checks.probability(_OP, "dropout", dropout)


def lora_linear_grouped(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    *,
    scale: float | torch.Tensor = 1.0,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """y_m = x_m Wᵀ + bias + scale · (drop(x_m) A_tᵀ B_tᵀ + lora_bias_t), t = index of row m

    x          [..., K]  fp32 | bf16 | fp16 (fp64 with the eager backend)
    weight     [N, K]    or None: the update alone, without bias
    lora_A     [T, R, K] any float dtype; lora_B [T, N, R], lora_bias [T, N] or None
    index      integers of x's first dimensions, or one: in [0, T), or -1 for the base alone
    bias, scale, dropout, backend    as in lora_linear
    Returns    y [..., N] in x.dtype, under autocast in its dtype. Differentiable in every tensor but index and scale.
    Cost       on a CPU each task's rows form one segment, gathered if they are scattered; no row has a copy of A. On a
               GPU, and under torch.compile, no host sync for the segments' sizes: one shrink and one expand of rank
               T · R, of which each row keeps its own R, 2M · T · R · (K + N) FLOP
    Raises     ValueError: shape, device, dropout; an index out of range, on a CPU: on a GPU its rows are NaN.
               TypeError: dtype.
    """
    _check(x, index, lora_A, lora_B, lora_bias, weight, bias, dropout)
    T, cast = lora_A.shape[0], _calls.autocast_dtype(x, x.device.type)
    rows = _rows_of(index, x.shape[:-1])
    # A trace would freeze the values that it reads as constants, and a fake tensor has none.
    traced = torch.compiler.is_compiling() or _derivatives.composed(_OP, backend, False)
    if traced or x.device.type != "cpu" or isinstance(rows, FakeTensor):
        return _masked(x, weight, lora_A, lora_B, rows, bias, lora_bias, scale, dropout, backend)
    if rows.numel():
        least, most = map(int, rows.aminmax())
        _checks.require(least >= -1, _OP, "index", "be at least -1", least)
        _checks.require(most < T, _OP, "index", f"be below the number of tasks, {T}", most)
    # Without a segment no operator runs that would check the backend.
    dispatch.select("lora_shrink", backend, "cpu", cast or x.dtype, _OP)
    y = _segments(x, lora_A, lora_B, rows, lora_bias, scale, dropout, backend)
    if weight is None:
        return y
    base = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(weight.dtype))
    return base + y.to(base.dtype)


def _masked(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scale: float | torch.Tensor,
    dropout: float,
    backend: str | None,
) -> torch.Tensor:
    (T, R, K), N = lora_A.shape, lora_B.shape[1]
    is_task = rows.view(*x.shape[:-1], 1) == torch.arange(T, device=x.device)
    lost = ((rows < -1) | (rows >= T)).view(*x.shape[:-1], 1)
    up = lora_B.permute(1, 0, 2).reshape(N, T * R)

    def keep(s: torch.Tensor) -> torch.Tensor:
        parts = torch.where(is_task.unsqueeze(-1), s.unflatten(-1, (T, R)), 0.0).flatten(-2)
        if lora_bias is not None:
            parts = torch.cat((parts, is_task.to(s.dtype)), dim=-1)
        return parts.masked_fill(lost, float("nan"))

    if lora_bias is not None:
        up = torch.cat((up, lora_bias.t()), dim=1)
    return lora_between(
        x, lora_A.reshape(T * R, K), up, keep, weight=weight, bias=bias, scale=scale, dropout=dropout, backend=backend
    )


def _segments(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    rows: torch.Tensor,
    lora_bias: torch.Tensor | None,
    scale: float | torch.Tensor,
    dropout: float,
    backend: str | None,
) -> torch.Tensor:
    """The update alone, one segment of rows at a time."""
    flat = x.reshape(-1, x.shape[-1])
    tasks, counts = rows.unique_consecutive(return_counts=True)
    order = None
    if tasks.numel() > tasks.unique().numel():
        order = rows.argsort(stable=True)
        flat = flat[order]
        tasks, counts = rows[order].unique_consecutive(return_counts=True)
    dtype = _calls.autocast_dtype(x, x.device.type) or x.dtype
    parts = []
    for t, part in zip(tasks.tolist(), flat.split(counts.tolist()), strict=True):
        if t < 0:
            parts.append(part.new_zeros(part.shape[0], lora_B.shape[1], dtype=dtype))
            continue
        own_bias = None if lora_bias is None else lora_bias[t]
        parts.append(lora_adapter(part, lora_A[t], lora_B[t], own_bias, scale=scale, dropout=dropout, backend=backend))
    if not any(t >= 0 for t in tasks.tolist()):  # a product of no rows, so that backward runs and reaches A and B
        own_bias = None if lora_bias is None else lora_bias[0]
        none = lora_adapter(flat[:0], lora_A[0], lora_B[0], own_bias, scale=scale, dropout=dropout, backend=backend)
        parts.append(none)
    y = torch.cat(parts)
    if order is not None:
        y = y[order.argsort()]
    return y.view(*x.shape[:-1], lora_B.shape[1])
