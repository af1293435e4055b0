"""The account of what a manager has put into its model: names, trained parameters, counts, switches."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import nn

from fastpeft.manager import counts
from fastpeft.manager.placing import Entry
from fastpeft.nn import Adapter, LoRAModule, LoRAParametrization, Mergeable
from fastpeft.nn.layers.stack import AdapterStack
from fastpeft.nn.prompts import VirtualTokens
from fastpeft.ops import _checks

_OP = "EfficientFineTuningManager"


class Disabled:
    """Returned by ``disable()``: used in a ``with``, it enables again what was disabled."""

    def __init__(self, modules: list[Any]) -> None:
        self._modules = modules

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self._modules:
            module.enable()


class Account:
    """The adapters of one model: the part of the manager that its other parts read.

    entries    one for each adapter and module
    methods    {adapter: {"method", "options", "each"}}: how to apply it again
    saved_modules    {path: module} of fully trained modules
    """

    def __init__(self, model: nn.Module) -> None:
        _checks.require_dtype(isinstance(model, nn.Module), _OP, "model", "be an nn.Module", type(model).__name__)
        self.model = model
        self.entries: list[Entry] = []
        self.methods: dict[str, dict[str, Any]] = {}
        self.saved_modules: dict[str, nn.Module] = {}
        # By name, so that a replaced (quantised) parameter is not kept alive.
        self._flags: dict[str, bool] | None = None

    def _flags_now(self) -> dict[str, bool]:
        return {name: p.requires_grad for name, p in self.model.named_parameters(remove_duplicate=False)}

    def _freeze(self, flags: dict[str, bool]) -> None:
        """Freeze the model, once, at the first adapter: only adapters that it already has stay trained.

        flags      ``requires_grad`` of every parameter before the first adapter was put in
        """
        if self._flags is not None:
            return
        self._flags = flags
        kinds = (LoRAModule, LoRAParametrization, Adapter, VirtualTokens)
        ours = {id(p) for m in self.model.modules() if isinstance(m, kinds) for name, p in m.named_parameters()
                if not (isinstance(m, Mergeable) and name in ("weight", "bias"))}  # fmt: skip
        for parameter in self.model.parameters():
            if id(parameter) not in ours:
                parameter.requires_grad_(False)

    def _thaw(self) -> None:
        """Restore ``requires_grad`` as it was before the first adapter."""
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if self._flags is not None and name in self._flags:
                parameter.requires_grad_(self._flags[name])
        self._flags = None

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters for an optimizer: every one that requires a gradient, once."""
        held = (entry.module for entry in self.entries if entry.place == "held")
        every = [p for module in (self.model, *held) for p in module.parameters() if p.requires_grad]
        return list({id(p): p for p in every}.values())

    def count_trainable_parameters(self) -> int:
        """The elements of ``get_trainable_parameters()``."""
        return sum(p.numel() for p in self.get_trainable_parameters())

    def summary(self) -> str:
        """A table as text: adapter, method, modules, trained parameters; and the trained share of all parameters."""
        rows: list[counts.Row] = []
        seen: set[int] = set()
        for name, record in self.methods.items():
            mine = self._of(name)
            fresh = {id(p): p for entry in mine for p in entry.parameters() if p.requires_grad and id(p) not in seen}
            seen |= fresh.keys()
            rows.append(counts.Row(name, record["method"], len(mine), sum(p.numel() for p in fresh.values())))
        if self.saved_modules:
            whole = counts.distinct(p for module in self.saved_modules.values() for p in module.parameters())
            number = sum(p.numel() for p in whole if p.requires_grad and id(p) not in seen)
            rows.append(counts.Row("", "trained whole", len(self.saved_modules), number))
        held = [p for entry in self.entries if entry.place == "held" for p in entry.module.parameters()]
        return counts.table(rows, [*self.model.parameters(), *held])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__})\n{self.summary()}"

    def _of(self, names: str | Iterable[str] | None = None) -> list[Entry]:
        """The entries of these adapters; None: of all."""
        wanted = list(self.methods) if names is None else [names] if isinstance(names, str) else list(names)
        for name in wanted:
            _checks.require(name in self.methods, _OP, "adapter", f"be one of {sorted(self.methods)}", repr(name))
        return [entry for entry in self.entries if entry.adapter in wanted]

    def enable(self, names: str | Iterable[str] | None = None) -> None:
        """Let the adapters of these names, or all, act. Adapters merged on their modules are unmerged first.

        The last ``switch`` decides which of them are trained.
        """
        entries = self._of(names)
        self._unmerge(entries)
        for entry in entries:
            for module in entry.switches():
                module.enable()

    def disable(self, names: str | Iterable[str] | None = None) -> Disabled:
        """Take the adapters of these names, or all, out of every later call; or out of a ``with`` block only.

        Adapters merged on their modules are unmerged first.
        """
        entries = self._of(names)
        self._unmerge(entries)
        acting = [module for entry in entries for module in entry.switches() if module.enabled]
        for module in acting:
            module.disable()
        return Disabled(acting)

    def switch(self, names: str | Iterable[str]) -> None:
        """Let only the adapters of these names, of all in this manager, act and be trained."""
        wanted = self._of(names)
        others = [entry for entry in self.entries if entry not in wanted]
        self.enable(names)
        self._unmerge(others)
        for entry in others:
            for module in entry.switches():
                module.disable()
            for parameter in entry.parameters():
                parameter.requires_grad_(False)
        for entry in wanted:  # last: a shared parameter is trained
            for parameter in entry.parameters():
                parameter.requires_grad_(True)

    def _units(self, entries: list[Entry]) -> list[Any]:
        """The units of merging: a stack with its layer, or a layer alone."""
        stacks = [module for module in self.model.modules() if isinstance(module, AdapterStack)]
        stack_of = {id(child): stack for stack in stacks
                    for child in (stack.layer, *stack.parallel.values(), *stack.serial.values())}  # fmt: skip
        units: dict[int, Any] = {}
        for entry in entries:
            for module in entry.switches():
                unit = stack_of.get(id(module), module)
                units[id(unit)] = unit
        return list(units.values())

    def _merged(self, entry: Entry) -> bool:
        return any(getattr(each, "merged", False) for each in (*self._units([entry]), *entry.switches()))

    def _unmerge(self, entries: list[Entry]) -> None:
        for unit in self._units(entries):
            if getattr(unit, "merged", False):
                unit.unmerge()
