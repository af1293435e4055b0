"""Why a PEFT layer is, or is not, computed by our operator; and the report that ``accelerate`` gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.nn import Module

from fastpeft.integrations.peft import kind as classes
from fastpeft.integrations.peft.kinds import kind_of


def unfit(module: Module) -> str | None:
    """Why a PEFT layer cannot have our class, or loses its calls to another forward; None if neither."""
    kind = kind_of(module)
    if kind is None:
        label = classes.label(module)
        if label == "lora.Linear8bitLt":
            return f"{label}: bitsandbytes multiplies 8-bit weights in integers, with a threshold for outliers"
        return f"{label} is not PEFT's lora.Linear"
    if isinstance(module, classes.Accelerated):
        return classes.bypassed(module) or classes.changed(module)
    return classes.unfit(kind, module)


def reason(
    module: Module, x: Any = None, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> str | None:
    """Why a call of this PEFT layer now goes to PEFT's own forward; None if our operator serves it.

    x, args, kwargs    the call in question; without x, only the layer and its present state are judged.
    """
    answer = unfit(module)
    if answer is not None:
        return answer
    kind = kind_of(module)
    assert kind is not None, "only layers of a kind are fit"
    return kind.reason(module, x, args, kwargs or {})


def grouped(names: list[str]) -> str:
    """A line that lists some of these layers."""
    shown = ", ".join(name or "(the model itself)" for name in names[:3])
    return f"         {shown}" + (f", ... {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(repr=False)
class Report:
    """What ``accelerate`` found; names are those of ``model.named_modules()``."""

    accelerated: list[str] = field(default_factory=list)
    """Layers that our operator computes from the next call on."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Every other PEFT layer -> why PEFT's own forward runs."""
    waiting: list[str] = field(default_factory=list)
    """Those of ``skipped`` that have our class: they are computed by our operator as soon as their state allows it."""
    changed: int = 0
    """Layers whose class this call of ``accelerate`` changed; 0 when there was nothing new."""
    unpacked: list[str] = field(default_factory=list)
    """4-bit layers, with an adapter or without, that are from now on not repacked by an evaluation on a CPU."""
    repacked: list[str] = field(default_factory=list)
    """Those that an evaluation before ``accelerate`` has repacked: no gradient passes them until they are unpacked."""
    note: str = ""
    """Why there was nothing to look at, if so."""

    def __str__(self) -> str:
        total = len(self.accelerated) + len(self.skipped)
        if not total:
            return f"fastpeft: nothing to accelerate: {self.note}"
        lines = [f"fastpeft: {len(self.accelerated)} of {total} PEFT layers accelerated"]
        groups: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            groups.setdefault(why, []).append(name)
        for why, names in sorted(groups.items(), key=lambda item: -len(item[1])):
            later = ", for now" if set(names) <= set(self.waiting) else ""
            lines.append(f"  {len(names):5d}  left to PEFT{later}: {why}")
            lines.append(grouped(names))
        for names, what in (
            (self.unpacked, "4-bit layers kept from bitsandbytes' repacking in eval mode, which ends their gradients"),
            (self.repacked, "4-bit layers repacked already: no gradient passes them until model.state_dict() unpacks"),
        ):
            if names:
                lines.append(f"  {len(names):5d}  {what}")
        return "\n".join(lines)

    __repr__ = __str__
