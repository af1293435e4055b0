"""The modules inside the object that a user holds: a model, a diffusers or transformers pipeline, a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module


def models_in(op: str, model: Any) -> list[tuple[str, Module]]:
    """(prefix of the names, module) of each module to look at.

    Raises     TypeError: neither a module nor an object with ``components`` or ``model``; the text names its modules.
    """
    if isinstance(model, Module):
        return [("", model)]
    components = getattr(model, "components", None)  # a pipeline of diffusers
    if isinstance(components, Mapping):
        found = [(f"{name}.", part) for name, part in components.items() if isinstance(part, Module)]
        if found:
            return found
    inner = getattr(model, "model", None)  # a Trainer, a pipeline of transformers
    if isinstance(inner, Module):
        return [("model.", inner)]
    held = model.items() if isinstance(model, Mapping) else vars(model).items() if hasattr(model, "__dict__") else ()
    names = [str(name) for name, part in held if isinstance(part, Module)]
    hint = f", which holds these: {', '.join(names)}" if names else ""
    raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}{hint}")
