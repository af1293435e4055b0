"""Putting adapters of any method into the model: names, targets, freezing, the record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from fastpeft.manager import defaults, methods, prompts, targets
from fastpeft.manager.account import Account
from fastpeft.manager.placing import Entry, Placer
from fastpeft.nn.layers.stack import AdapterStack
from fastpeft.ops import _checks

_Self = TypeVar("_Self", bound="Applying")


class Applying(Account):
    """How an adapter of any method is applied."""

    def _apply(self: _Self, method: str, target_modules: Any, options: dict[str, Any]) -> _Self:
        op = f"apply_{method}"
        name = self._free_name(op, method, options.pop("adapter_name", None))
        saved = self._named_modules(op, options.pop("modules_to_save", None))
        for entry in self._place(op, name, method, target_modules, options, {}, saved):
            entry.forget_packed()
        self._save_whole(saved)
        return self

    def _place(
        self,
        op: str,
        name: str,
        method: str,
        wanted: Any,
        options: dict[str, Any],
        each: dict[str, Any],
        spared: dict[str, nn.Module] | None = None,
    ) -> list[Entry]:
        """Put an adapter in, freeze the model before the first one, and record the adapter.

        each       options of individual modules, by path
        spared     modules that get no adapter, and nothing below them does
        """
        kind, modules = options.get("kind", ""), targets.walk(self.model)
        if wanted is None:
            wanted = defaults.of(op, method, self.model, modules, kind)
        lost = methods.never_called(modules.values())

        def supported(module: nn.Module) -> bool:
            return id(module) not in lost and methods.supports(method, module, kind)

        found = targets.find(op, modules, wanted, supported, methods.described(method, kind))
        _checks.require("" not in found, op, "model", "hold the layers to adapt, not be one", type(self.model).__name__)
        whole = [*(spared or {}), *self.saved_modules]
        left = {path: m for path, m in found.items() if not any(f"{path}.".startswith(f"{s}.") for s in whole)}
        _checks.require(bool(left), op, "target_modules", "match more than modules_to_save", whole)
        merged = [entry.path for entry in self.entries if entry.path in left and self._merged(entry)]
        _checks.require(not merged, op, "model", "be unmerged where it gets a further adapter", merged[:3])
        flags = self._flags_now()
        entries = Placer(op, self.model, name, method, options, each).place(left, modules)
        self._freeze(flags)
        self.entries += entries
        self.methods[name] = {"method": method, "options": dict(options), "each": each}
        return entries

    def _save_whole(self, saved: dict[str, nn.Module]) -> None:
        self.saved_modules |= saved
        for module in saved.values():
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)

    def _prompt(self: _Self, method: str, options: dict[str, Any]) -> _Self:
        op = f"apply_{method}"
        name = self._free_name(op, method, options.pop("adapter_name", None))
        saved = self._named_modules(op, options.pop("modules_to_save", None))
        module, recorded = prompts.made(op, method, self.model, options)
        flags = self._flags_now()
        place = prompts.put_in(op, self.model, module)
        self._freeze(flags)
        self.entries.append(Entry(name, method, "", module, place))
        self.methods[name] = {"method": method, "options": recorded, "each": {}}
        self._save_whole(saved)
        return self

    def _free_name(self, op: str, method: str, name: str | None) -> str:
        taken = set(self.methods)
        for module in self.model.modules():
            taken |= set(module.names()) if isinstance(module, AdapterStack) else set()
        if name is None:
            numbered = (method if i == 1 else f"{method}_{i}" for i in range(1, len(taken) + 2))
            return next(each for each in numbered if each not in taken)
        _checks.require_dtype(isinstance(name, str), op, "adapter_name", "be a string", type(name).__name__)
        # A stack of adapters is an nn.ModuleDict, whose attributes are no keys.
        sound = bool(name) and "." not in name and "/" not in name and not hasattr(nn.ModuleDict(), name)
        _checks.require(sound, op, "adapter_name", "be a name without dots and slashes, of no method", repr(name))
        _checks.require(name not in taken, op, "adapter_name", "be free", repr(name))
        return name

    def _named_modules(self, op: str, wanted: Sequence[str] | str | None) -> dict[str, nn.Module]:
        if wanted is None:
            return {}

        def holds(module: nn.Module) -> bool:
            return any(True for _ in module.parameters())

        found = targets.find(op, targets.walk(self.model), wanted, holds, "modules with parameters", "modules_to_save")
        _checks.require("" not in found, op, "modules_to_save", "name modules of the model, not itself", repr(wanted))
        adapted = [entry.path for entry in self.entries if any(f"{entry.path}.".startswith(f"{p}.") for p in found)]
        _checks.require(not adapted, op, "modules_to_save", "name modules without adapters", adapted[:3])
        return found

    def _latest(self, method: str) -> Any:
        return next((entry.module for entry in reversed(self.entries) if entry.method == method), None)

    @property
    def ptuning_embeddings(self) -> Any:
        """The `PTuningEmbedding` that was applied last, or None."""
        return self._latest("ptuning")

    @property
    def prompt_embeddings(self) -> Any:
        """The `PromptEmbedding` that was applied last, or None."""
        return self._latest("prompt_tuning")

    @property
    def prefix_tuning(self) -> Any:
        """The `PrefixTuning` that was applied last, or None."""
        return self._latest("prefix_tuning")

    @property
    def adalora_layers(self) -> dict[str, nn.Module]:
        """{name of the adapted module: its AdaLoRA layer}."""
        return {entry.path: entry.module for entry in self.entries if entry.method == "adalora"}
