"""The calls that each accelerated layer has served and left to PEFT: a report predicts, this module counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastpeft.integrations.peft import calls
from fastpeft.integrations.peft.containers import models_in
from fastpeft.integrations.peft.kind import Accelerated, is_peft_layer
from fastpeft.integrations.peft.report import grouped, unfit

__all__ = ["LayerCalls", "Status", "status"]


@dataclass(frozen=True)
class LayerCalls:
    """The calls of one layer since it was accelerated."""

    served: int
    """Calls that our operator computed."""
    left: dict[str, int]
    """Why PEFT's own forward ran -> calls."""


@dataclass(repr=False)
class Status:
    """Counted calls of a model's accelerated layers; names are those of ``model.named_modules()``."""

    layers: dict[str, LayerCalls] = field(default_factory=dict)
    """Every layer that has our class."""
    others: dict[str, str] = field(default_factory=dict)
    """Every other PEFT layer, whose calls nobody counts -> why it has not."""
    graphs: tuple[int, int] = (0, 0)
    """Calls that torch.compile has traced as ours, and as PEFT's, in this process: its graphs count none themselves."""

    @property
    def served(self) -> int:
        """Calls that our operators computed."""
        return sum(layer.served for layer in self.layers.values())

    @property
    def left(self) -> dict[str, int]:
        """Why PEFT's own forward ran -> calls, the most frequent first."""
        total: dict[str, int] = {}
        for layer in self.layers.values():
            for why, count in layer.left.items():
                total[why] = total.get(why, 0) + count
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    @property
    def idle(self) -> list[str]:
        """Layers with our class but no counted call: never called, or only inside torch.compile."""
        return [name for name, layer in self.layers.items() if not layer.served and not layer.left]

    def __str__(self) -> str:
        if not self.layers and not self.others:
            return "fastpeft: no PEFT layers"
        left = self.left
        calls_left = sum(left.values())
        lines = [f"fastpeft: {self.served} calls served, {calls_left} left to PEFT, in {len(self.layers)} layers"]
        for why, count in left.items():
            names = [name for name, layer in self.layers.items() if why in layer.left]
            lines += [f"{count:7d}  calls left: {why}", grouped(names)]
        if self.idle:
            lines += [f"{len(self.idle):7d}  layers without a counted call", grouped(self.idle)]
        for why in dict.fromkeys(self.others.values()):
            names = [name for name, each in self.others.items() if each == why]
            lines += [f"{len(names):7d}  layers not accelerated, calls not counted: {why}", grouped(names)]
        if any(self.graphs):
            ours, others = self.graphs
            lines.append(f"         torch.compile traced {ours} calls as ours, {others} as PEFT's; graphs count none")
        return "\n".join(lines)

    __repr__ = __str__


def status(model: Any) -> Status:
    """The calls of ``model``'s accelerated layers since `accelerate`: served, and left to PEFT by reason.

    model      as for `accelerate`. A recomputed forward (gradient checkpointing) counts again; a copy of a layer starts
               from zero; `restore` drops the counts
    Returns    a `Status`: print it
    Raises     TypeError: neither a module nor something that holds models
    """
    found = Status(graphs=calls.graphs())
    for prefix, part in models_in("status", model):
        for name, module in part.named_modules():
            if isinstance(module, Accelerated):
                served, left = calls.count(module)
                found.layers[prefix + name] = LayerCalls(served, left)
            elif is_peft_layer(module):
                found.others[prefix + name] = unfit(module) or "accelerate has not been called since it is there"
    return found
