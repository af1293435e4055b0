"""A hook that keeps torch's fast path, which reads a module's weight without calling it, away from a module.

In eval mode nn.TransformerEncoderLayer hands ``linear1.weight`` and the like to one fused operator, and a LoRA update
would silently be gone. It declines if a module inside it has a forward hook, so our modules have one that does
nothing. nn.Module runs hooks, for a microsecond a call, only if their dict is truthy: the dict of a LoRA module is
truthy only if it holds another hook.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

KEY: Any = "fastpeft.called"


def called(module: nn.Module, args: Any) -> None:
    """The hook: it leaves the arguments unchanged."""


class _Hooks(OrderedDict[Any, Callable[..., Any]]):
    def __bool__(self) -> bool:
        return len(self) > (KEY in self)


def must_be_called(module: nn.Module) -> None:
    """Give ``module`` the hook without a cost per call; it survives deepcopy and pickle, and others may be added."""
    hooks = _Hooks(module._forward_pre_hooks)
    hooks[KEY] = called
    module._forward_pre_hooks = hooks
