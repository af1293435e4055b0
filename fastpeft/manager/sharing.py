"""One adapter for several layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fastpeft.nn import LoRAModule, Mergeable
from fastpeft.ops import _checks

_SHARED = ("lora_A", "lora_B", "lora_bias", "mask_A", "mask_B")


def _held(module: nn.Module, name: str) -> Any:
    value = module._parameters.get(name)
    return module._buffers.get(name) if value is None else value


def share_lora(modules: Iterable[nn.Module]) -> None:
    """Let LoRA modules of equal shape share the first one's lora_A, lora_B, lora_bias and mask.

    Gradients add up; ``parameters()``, an optimizer and the manager's files hold each tensor once; loading or copying a
    module that holds all sharers keeps them shared. Scalings, importances and gates stay separate. Build the optimizer
    afterwards.
    Raises     TypeError: not a LoRA module.  ValueError: fewer than two, one without its own A and B, different shapes,
               layouts, dtypes or devices, or a merged module; nothing has been changed then.
    """
    op, listed = "share_lora", list(modules)
    _checks.require(len(listed) >= 2, op, "modules", "be two or more", len(listed))
    for module in listed:
        _checks.require_dtype(isinstance(module, LoRAModule), op, "modules", "be LoRA modules", type(module).__name__)
        own = {"lora_A", "lora_B"} <= module._parameters.keys()
        _checks.require(own, op, "modules", "have lora_A and lora_B of their own", type(module).__name__)
        merged = isinstance(module, Mergeable) and module.merged
        _checks.require(not merged, op, "modules", "be unmerged", type(module).__name__)
    first: Any = listed[0]
    for module in listed[1:]:
        same = module.layout == first.layout
        _checks.require(same, op, "layout", f"be the first module's, {first.layout}", module.layout)
        for name in _SHARED:
            like, other = _described(_held(first, name)), _described(_held(module, name))
            _checks.require(like == other, op, name, f"be as the first module's, {like}", other)
    for module in listed[1:]:
        for name in _SHARED:
            for held, source in ((module._parameters, first._parameters), (module._buffers, first._buffers)):
                if source.get(name) is not None:
                    held[name] = source[name]


def _described(value: Any) -> str:
    return "missing" if value is None else f"{list(value.shape)} {value.dtype} on {value.device}"
