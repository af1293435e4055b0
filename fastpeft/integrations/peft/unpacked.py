"""bitsandbytes' 4-bit layers of a model that trains, kept in the format that has gradients.

In eval mode on a CPU with AVX-512-BF16, ``Linear4bit.forward`` repacks the weight, for good. That rounds the scales,
and the repacked product has no gradient: after one evaluation nothing below the layer trains. Layers without an adapter
are affected too: PEFT's default for Llama adapts two of seven. A layer reads an attribute before it repacks, so its
class gets a property of that name: no value is set and reset, which two threads could interleave.
"""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from fastpeft.integrations.peft.inplace import InPlace, built
from fastpeft.integrations.peft.kind import imported
from fastpeft.integrations.peft.linear4bit import state_of

_ASKED = "support_avx512bf16_for_cpu"


class Unpacked(InPlace):
    """Comes before bitsandbytes' ``Linear4bit``; the instance keeps its own value for when the class is taken out."""

    @property
    def support_avx512bf16_for_cpu(self) -> bool:
        return False

    @support_avx512bf16_for_cpu.setter
    def support_avx512bf16_for_cpu(self, value: bool) -> None:
        vars(self)[_ASKED] = value


def keepable(model: Module, bases: list[Any]) -> dict[str, Module]:
    """The 4-bit layers of ``model`` to keep: ``bases`` and, if a parameter of the model trains, all others."""
    kind = imported("bitsandbytes.nn.modules", "Linear4bit")
    if kind is None:
        return {}
    trains = any(parameter.requires_grad for parameter in model.parameters())
    wanted = {id(base) for base in bases}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kind)
        and (trains or id(module) in wanted)
        and vars(module).get(_ASKED)
        and not hasattr(module, "parametrizations")  # removing those gives the module its first base class
    }


def kept(module: Any) -> type:
    """The class that keeps this layer from repacking."""
    kind = type(module)
    return kind if issubclass(kind, Unpacked) else built(Unpacked, kind)


def repacked(module: Any) -> bool:
    """Whether the layer's weight is already in the format without gradients."""
    return bool(getattr(state_of(module), "packing_format_for_cpu", False))
