"""How a module makes torch's fast path, which would read its weight and not call it, see that it must be called.

In eval mode nn.TransformerEncoderLayer hands ``linear1.weight`` and the like to one fused operator, and what a LoRA
module adds would silently be gone. It declines where a module inside it has a forward hook; so ours have one, which
does nothing. nn.Module runs hooks, for a microsecond a call, only where their dict is truthy: the dict of a LoRA module
is truthy only where it holds another hook.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

KEY: Any = "fastpeft.called"


def called(module: nn.Module, args: Any) -> None:
    """The hook: no change of the arguments."""


class _Hooks(OrderedDict[Any, Callable[..., Any]]):
    def __bool__(self) -> bool:
        return len(self) > (KEY in self)


def must_be_called(module: nn.Module) -> None:
    """Give ``module`` the hook without a cost per call; it survives deepcopy and pickle, and others may be added."""
    hooks = _Hooks(module._forward_pre_hooks)
    hooks[KEY] = called
    module._forward_pre_hooks = hooks
