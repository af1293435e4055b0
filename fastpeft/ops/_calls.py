"""Shared by the differentiable operators: autocast's dtype, rows, a scale that is a tensor, the seed of a mask."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastpeft import dispatch
from fastpeft.ops import _checks


def autocast_dtype(x: torch.Tensor, device: str) -> torch.dtype | None:
    """The dtype that autocast asks for, or None if it is off; fp64 stays fp64, as in torch.amp."""
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


def masks(saved: list[torch.Tensor | None]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The pair of masks at the end of a backward's saved tensors, ``saved``; (None, None) if there are none."""
    if not saved:
        return None, None
    a, b = saved
    return None if a is None else a.contiguous(), None if b is None else b.contiguous()


def shaped(y: torch.Tensor, leading: torch.Size) -> torch.Tensor:
    """[M, width] -> [*leading, width], not a view to autograd: a caller may add to it in place."""
    return y if len(leading) == 1 else torch.ops.aten._unsafe_view.default(y, [*leading, y.shape[1]])


def nested(x: torch.Tensor, call: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply ``call``, rows [M, width] -> rows, to all rows of a nested x at once; the result is nested as x is."""
    parts = x.unbind()
    y = call(torch.cat([part.flatten(0, -2) for part in parts]))
    split = y.split([part.shape[:-1].numel() for part in parts])
    return torch.nested.as_nested_tensor(
        [rows.view(*part.shape[:-1], -1) for rows, part in zip(split, parts, strict=True)]
    )


def like_input(dx: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """dx [M, K] in the shape and dtype of the caller's x; a view where that is possible."""
    if len(shape) != 2:
        dx = dx.view(shape)
    return dx if dx.dtype == dtype else dx.to(dtype)


def fold_scale(
    op: str, scale: float | torch.Tensor, lora_B: torch.Tensor, lora_bias: torch.Tensor | None, compiling: bool
) -> tuple[float, torch.Tensor, torch.Tensor | None]:
    """Multiply a scale that is not a plain number into B and lora_bias, in fp32 at least.

    So a 0-d tensor stays on the device, without a host sync. While torch.compile traces, a float is folded too: one
    that changes is a symbol there, of which an autograd.Function would make a constant, and a graph for each value.
    """
    _checks.scale(op, scale)
    if not compiling and not isinstance(scale, torch.Tensor):
        return float(scale), lora_B, lora_bias
    lora_B = lora_B.float() if lora_B.element_size() < 4 else lora_B
    lora_bias = lora_bias.float() if lora_bias is not None and lora_bias.element_size() < 4 else lora_bias
    return 1.0, lora_B * scale, None if lora_bias is None else lora_bias * scale


def draw_seed(device: torch.device | str) -> torch.Tensor:
    """The seed of one dropout mask, a 0-d int64 tensor from torch's generator of ``device``.

    It stays on the device: no sync, and a replayed CUDA graph draws a new one. (``randint`` and not ``random_``, which
    torch.compile cannot trace.)
    """
    return torch.randint(2**63 - 1, (), device=device)


def without_kernels(launcher: str, device: str) -> str | None:
    """What every backend but eager lacks to serve this operator on this type of device; None if one serves.

    Also None if a backend is asked for: a user who wants eager gets it.
    """
    if dispatch.default is not None or dispatch.select(launcher, None, device, torch.float32) != "eager":
        return None
    found = ((backend, dispatch.unmet(launcher, backend, device, torch.float32)) for backend in dispatch.BACKENDS)
    elsewhere = ("tensors on", "an implementation")
    needs = [f"{backend} requires {need}" for backend, need in found if need and not need.startswith(elsewhere)]
    return "; ".join(needs) or "no other backend is for it"
