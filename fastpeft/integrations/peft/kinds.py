"""The kinds of PEFT layer that we serve. A new kind is a file beside this one and an entry here."""

from __future__ import annotations

from torch.nn import Module

from fastpeft.integrations.peft import linear, linear4bit
from fastpeft.integrations.peft.kind import Kind

KINDS: tuple[Kind, ...] = (linear.KIND, linear4bit.KIND)


def register() -> None:
    """Let every kind look up what its calls compare with."""
    for kind in KINDS:
        kind.register()


def kind_of(module: Module) -> Kind | None:
    """The kind of this layer, whether or not it already has our class; None for a layer that no kind knows."""
    for kind in KINDS:
        peft_class = kind.peft_class()
        if peft_class is not None and isinstance(module, peft_class):
            return kind
    return None
