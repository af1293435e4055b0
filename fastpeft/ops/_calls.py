"""What the differentiable operators share: autocast's dtype, rows, a scale that is a tensor, and the seed of a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fastpeft.ops import _checks


def autocast_dtype(x: torch.Tensor, device: str) -> torch.dtype | None:
    """The dtype that autocast asks for, or None where it is off; fp64 stays, as torch.amp leaves it alone too."""
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def rows(x: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[..., width] -> [M, width] in ``dtype`` with the last dimension contiguous; a view where that is possible."""
    if x.dim() != 2:
        x = x.reshape(-1, width)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x if x.dtype == dtype else x.to(dtype)


def shaped(y: torch.Tensor, leading: torch.Size) -> torch.Tensor:
    """[M, width] -> [*leading, width], and no view in autograd's eyes: a caller may add to it in place."""
    return y if len(leading) == 1 else torch.ops.aten._unsafe_view.default(y, [*leading, y.shape[1]])


def like_input(dx: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """dx [M, K] in the shape and dtype of the caller's x; a view where that is possible."""
    if len(shape) != 2:
        dx = dx.view(shape)
    return dx if dx.dtype == dtype else dx.to(dtype)


_TWICE = (
    b"fastpeft: y must be differentiated once, got a second derivative: PEFT's own layers have one, which "
    b"fastpeft.restore gives back"
)


def once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """torch's once_differentiable with an error that says what can be done."""

    def wrapped(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            gradients = backward(ctx, dy)
        if not torch.is_grad_enabled() or not dy.requires_grad:
            return gradients
        fail = torch._C._functions.DelayedError(_TWICE, len(gradients))
        views: list[Any] = [None if g is None else g.detach().requires_grad_() for g in gradients]
        failing: tuple[Any, ...] = fail(*views)
        return failing

    return wrapped


def forward_mode() -> bool:
    """Inside forward-mode differentiation, which no_grad does not switch off: our Functions raise there."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def fold_scale(
    op: str, scale: float | torch.Tensor, lora_B: torch.Tensor, lora_bias: torch.Tensor | None
) -> tuple[float, torch.Tensor, torch.Tensor | None]:
    """A 0-d tensor goes into the small factor, which keeps the value on the device: no host sync."""
    if type(scale) is float:
        return scale, lora_B, lora_bias
    _checks.scale(op, scale)
    if isinstance(scale, torch.Tensor):
        return 1.0, lora_B * scale, None if lora_bias is None else lora_bias * scale
    return float(scale), lora_B, lora_bias


def draw_seed(device: torch.device | str) -> torch.Tensor:
    """The seed of one dropout mask, int64 of no dimension, from torch's generator of ``device``.

    It stays on the device: no sync, and a replayed CUDA graph draws a new one. (``randint`` and not ``random_``, which
    torch.compile cannot trace.)
    """
    return torch.randint(2**63 - 1, (), device=device)
