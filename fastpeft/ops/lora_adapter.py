"""``y = scale · (drop(x) Aᵀ Bᵀ + lora_bias)``: LoRA without a base, composed of the four primitives."""

from __future__ import annotations

from typing import Any

import torch

from fastpeft import dispatch
from fastpeft.ops import _checks, _library


def _rows(x: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[..., width] -> [M, width] in ``dtype`` with the last dimension contiguous; a view where that is possible."""
    x = x.reshape(-1, width) if x.dim() != 2 else x
    x = x if x.stride(1) == 1 else x.contiguous()
    return x if x.dtype == dtype else x.to(dtype)


class _LoRAAdapter(torch.autograd.Function):
    """Saves x and s (and the parameters); the mask is drawn again from the seed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        lora_bias: torch.Tensor | None,
        scale: float,
        p: float,
        seed: torch.Tensor | None,
        dtype: torch.dtype,
        backend: str,
    ) -> torch.Tensor:
        y, s = _forward(x, a, b, lora_bias, scale, p, seed, dtype, backend)
        need = ctx.needs_input_grad
        # What no gradient asks for is not kept alive: a frozen A saves no x, a frozen B no s.
        ctx.save_for_backward(x if need[1] else None, a, b, s if need[2] else None, seed)
        ctx.call = (scale, p, dtype, backend, x.shape, x.dtype, None if lora_bias is None else lora_bias.dtype)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, s, seed = ctx.saved_tensors
        scale, p, dtype, backend, shape, x_dtype, bias_dtype = ctx.call
        need_dx, need_da, need_db, need_bias = ctx.needs_input_grad[:4]
        dy = _rows(dy, b.shape[0], dtype)
        s = dy.new_empty(0, b.shape[1]) if s is None else s
        ds, db, sums = _library.call("lora_grad_b", backend, dy, s, b, scale, need_db, need_bias)
        da = dx = None
        if need_dx or need_da:
            x = dy.new_empty(0, a.shape[1]) if x is None else _rows(x, a.shape[1], dtype)
            da, dx = _library.call("lora_grad_a", backend, x, ds, a, p, seed, need_dx, need_da)
        return (
            dx.view(shape).to(x_dtype) if need_dx else None,
            da if need_da else None,
            db if need_db else None,
            (sums * scale).to(bias_dtype) if need_bias else None,
            None,
            None,
            None,
            None,
            None,
        )


def _forward(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    lora_bias: torch.Tensor | None,
    scale: float,
    p: float,
    seed: torch.Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    s = _library.call("lora_shrink", backend, _rows(x, a.shape[1], dtype), a, p, seed)
    y = _library.call("lora_expand", backend, s, b, None, lora_bias, scale)
    return (y if x.dim() == 2 else y.view(*x.shape[:-1], b.shape[0])), s


def _draw(device: torch.device) -> torch.Tensor:
    """A seed from torch's generator of ``device``, left on it; Dynamo has no rule for ``random_``."""
    if torch.compiler.is_compiling():
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    return torch.empty((), dtype=torch.int64, device=device).random_()


def _check(
    x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, lora_bias: torch.Tensor | None, dropout: float
) -> None:
    op = "lora_adapter"
    _checks.tensor(op, "x", x)
    _checks.require_dtype(x.dtype in _checks.FLOATS, op, "x", "be float32, bfloat16, float16 or float64", x.dtype)
    _checks.require(x.dim() >= 1, op, "x", "have at least one dimension", "a 0-d tensor")
    _checks.matrix(op, "lora_A", lora_A, (None, x.shape[-1]), "[rank, in_features]")
    _checks.require(lora_A.shape[0] >= 1, op, "lora_A", "have a rank of at least 1", 0)
    _checks.matrix(op, "lora_B", lora_B, (None, lora_A.shape[0]), "[out_features, rank]")
    _checks.vector(op, "lora_bias", lora_bias, lora_B.shape[0], "out_features")
    _checks.same_device(op, x.device, lora_A=lora_A, lora_B=lora_B, lora_bias=lora_bias)
    _checks.probability(op, "dropout", dropout)


def lora_adapter(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    lora_bias: torch.Tensor | None = None,
    *,
    scale: float | torch.Tensor = 1.0,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """y = scale · (drop(x) Aᵀ Bᵀ + lora_bias)                      Hu et al. 2021, arXiv:2106.09685, eq. 3 without W

    x          [..., K]  fp32 | bf16 | fp16 (fp64 with the eager backend), any strides
    lora_A     [R, K]    any float dtype and strides; R >= 1
    lora_B     [N, R]    any float dtype and strides
    lora_bias  [N]       any float dtype, or None
    scale      float or 0-d tensor, dimensionless
    dropout    probability in [0, 1) that an element of x is hidden from A; the contract of lora_linear
    backend    "cpp" | "triton" | "eager", or None for the first that serves
    Returns    y [..., N] in x.dtype, under autocast in its dtype; summed in fp32. Differentiable once in every tensor
               but a float scale.
    Saves      x (the caller's own tensor), s = drop(x) Aᵀ [M, R] and the seed; what no gradient needs is not saved
    Cost       2MR(K + N) FLOP forward, twice that backward; x is read once and y written once each way
    Raises     ValueError: shape, device, dropout or backend.  TypeError: dtype.
    """
    _check(x, lora_A, lora_B, lora_bias, dropout)
    dtype, device = x.dtype, x.device
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    if isinstance(scale, torch.Tensor):
        # Into the small factor, which keeps the value on the device: no host sync.
        lora_B = lora_B * scale
        lora_bias = None if lora_bias is None else lora_bias * scale
        scale = 1.0
    seed = _draw(device) if dropout else None
    chosen = dispatch.select("lora_shrink", backend, device.type, dtype)
    call = (x, lora_A, lora_B, lora_bias, float(scale), dropout, seed, dtype, chosen)
    if torch.is_grad_enabled():
        return _LoRAAdapter.apply(*call)  # type: ignore[no-any-return]
    return _forward(*call)[0]
