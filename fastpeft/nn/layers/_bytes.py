"""A parameter whose bytes are codes, not numbers, in a module whose parameters may be averaged.

``p.copy_(p * decay + p * (1 - decay))``, which an exponential moving average does to every parameter, is not the
identity for integers: many float sums fall just below the integer and are truncated. Such a copy is rounded here.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

_Self = TypeVar("_Self", bound="Bytes")


class Bytes(torch.Tensor):
    """A tensor that overrides two methods and none of torch's functions: kernels and graphs see a plain one.

    Its copies and files are plain; ``detach``, which averages and state dicts use, gives one like it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> Any:
        return torch.Tensor._make_subclass(cls, data.as_subclass(torch.Tensor), requires_grad)

    def copy_(self: _Self, source: torch.Tensor, non_blocking: bool = False) -> _Self:
        super().copy_(source.round() if source.is_floating_point() else source, non_blocking)
        return self

    def detach(self) -> Bytes:
        return super().detach().as_subclass(Bytes)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self.as_subclass(torch.Tensor).clone()
        memo[id(self)] = copied = nn.Parameter(copied, False) if isinstance(self, nn.Parameter) else copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = self.as_subclass(torch.Tensor)
        return (nn.Parameter(plain, False) if isinstance(self, nn.Parameter) else plain).__reduce_ex__(protocol)


class BytesParameter(Bytes, nn.Parameter):
    """The class that ``hold_bytes`` gives a parameter."""


def hold_bytes(module: nn.Module, name: str) -> None:
    """Make a frozen uint8 parameter of ``module`` a `BytesParameter`, on the same memory."""
    parameter: Any = module._parameters[name]
    if type(parameter) in (nn.Parameter, Bytes):
        module._parameters[name] = BytesParameter(parameter.data)
