"""Merging adapters into the base weights, combining them, and taking them out of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastpeft.manager import methods, placing
from fastpeft.manager.account import _OP
from fastpeft.manager.applying import Applying
from fastpeft.manager.placing import Entry
from fastpeft.nn import LoRALayer, LoRAModule, Mergeable
from fastpeft.nn.config import number
from fastpeft.nn.layers.stack import AdapterStack, update_of
from fastpeft.nn.merge import Update, stacked, wide
from fastpeft.nn.prompts import remove_prompt
from fastpeft.ops import _checks


class Merging(Applying):
    """merge, unmerge, combine, delete, unload."""

    def merge(self) -> nn.Module:
        """Add every enabled update to its base weight, all updates of a module with one rounding; returns the model.

        ``unmerge()`` restores the base bit for bit, and so does ``train()``.
        Raises     ValueError: an update that is not one matrix (a prompt, an `Adapter`, a gate, a task), or a base that
                   accepts no update; nothing has been merged then.
        """
        for entry in self.entries:
            rule = "be taken out, or disabled, for merge(): its update is no matrix"
            matrix = entry.place not in ("inserted", "held") or not entry.switches()[0].enabled
            _checks.require(matrix, _OP, f"adapter {entry.adapter!r}", rule, entry.method)
        done: list[Any] = []
        try:
            for unit in self._units(self.entries):
                if self._acts(unit) and not unit.merged:
                    unit.merge()
                    done.append(unit)
        except BaseException:
            for unit in done:
                unit.unmerge()
            raise
        return self.model

    @staticmethod
    def _acts(unit: Any) -> bool:
        if not isinstance(unit, AdapterStack):
            return bool(unit.enabled) and hasattr(unit, "merge")
        own = isinstance(unit.layer, Mergeable) and unit.layer.enabled
        return own or any(each.enabled for each in (*unit.parallel.values(), *unit.serial.values()))

    def unmerge(self) -> nn.Module:
        """Restore the base bit for bit; returns the model."""
        self._unmerge(self.entries)
        return self.model

    def delete(self, name: str) -> None:
        """Take out only the adapter of that name; adapters merged on its modules are unmerged first."""
        entries = self._of(name)
        self._unmerge(entries)
        self._take_out(entries)
        del self.methods[name]
        if not self.methods:
            self.unload()

    def unload(self) -> nn.Module:
        """Take every adapter out and restore the model's own modules; merged updates stay in; returns the model.

        A 4-bit weight comes back dequantised. Modules named in ``modules_to_save`` keep their trained values. Every
        parameter's ``requires_grad`` is as it was before the first adapter.
        """
        self._take_out(list(self.entries))
        self.methods, self.saved_modules = {}, {}
        self._thaw()
        return self.model

    def _take_out(self, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.place == "inserted":
                remove_prompt(self.model)
            self.entries.remove(entry)
        placing.take_out(self.model, entries)

    @torch.no_grad()
    def combine(
        self, names: Sequence[str], weights: Sequence[float] | None = None, adapter_name: str = "combined"
    ) -> Merging:
        """Make a LoRA adapter whose update is exactly Σ weightₙ · updateₙ of the adapters ``names``, by stacking ranks.

        weights    one each, of either sign; default: 1
        The new adapter acts and is trained; the adapters ``names`` are disabled, as by ``switch``, and otherwise
        unchanged. Dropout is 0.
        Raises     ValueError: names, an update that is not one matrix, or one on a module that takes no further adapter
                   (a convolution, a recurrent layer, an attention's inputs); nothing has been changed then.
        """
        op, listed = "combine", list(names)
        _checks.require(len(listed) > 0 and len(set(listed)) == len(listed), op, "names", "be different ones", listed)
        factors = [1.0] * len(listed) if weights is None else [number(op, "weights", each) for each in weights]
        _checks.require(len(factors) == len(listed), op, "weights", f"be {len(listed)}", len(factors))
        by_path: dict[str, list[Update]] = {}
        for name, factor in zip(listed, factors, strict=True):
            for entry in self._of(name):
                by_path.setdefault(entry.path, []).append(_weighted(op, entry, factor))
        adapter = self._free_name(op, "lora", adapter_name)
        each: dict[str, Any] = {}
        sums: dict[str, Update] = {}
        for path, updates in by_path.items():
            sums[path] = stacked(updates, wide(torch.bfloat16))
            each[path] = {"rank": sums[path].a.shape[0], "bias": sums[path].bias is not None}
        options = {"scaling": 1.0, "dropout": 0.0}
        entries = self._place(op, adapter, "lora", list(by_path), options, each)
        for entry in entries:
            layer: Any = entry.module
            update = sums[entry.path]
            layer.lora_A.copy_(update.a)
            layer.lora_B.copy_(update.b * update.scale)
            if update.bias is not None:
                layer.lora_bias.copy_(update.bias * update.scale)
        self.switch(adapter)
        return self


def _weighted(op: str, entry: Entry, factor: float) -> Update:
    module = entry.module
    linear = isinstance(module, LoRALayer) or methods.sizes(module) is not None
    rule = "be LoRA on linear layers for combine()"
    _checks.require(linear and entry.method != "adapter", op, f"adapter {entry.adapter!r}", rule, type(module).__name__)
    assert isinstance(module, LoRAModule)
    update = update_of(module)
    return Update(update.a, update.b, update.scale * factor, update.bias)
