"""AdapterStack: further adapters beside a layer that has one already, or beside and behind any module."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from fastpeft.nn.factors.base import LoRAModule
from fastpeft.nn.merge import Mergeable, MergeReport, Update, added, added_bias, stacked, wide
from fastpeft.ops import _checks

_OP = "AdapterStack"
_Self = TypeVar("_Self", bound="AdapterStack")


class AdapterStack(nn.Module):
    """y = serialₙ(… serial₁(layer(x) + Σ parallel(x)))

    layer      any module; where it returns a tuple, the adapters act on its first element
    parallel   {name: module} that read x and add to the output: LoRALayer and its variants, Adapter(kind="parallel")
    serial     {name: module} that read the output: Adapter

    Every other attribute is the layer's: owners read ``linear1.weight`` or ``self_attn.batch_first``.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.parallel, self.serial = nn.ModuleDict(), nn.ModuleDict()
        # The undo of `merge`: the base's Undo, or a copy of a plain layer's weight and bias; and the adapters merged.
        self._merge_of: Any = None
        self._names: tuple[str, ...] = ()
        self.training = layer.training

    def names(self) -> list[str]:
        """The names of the adapters."""
        return [*self.parallel, *self.serial]

    def add(self, name: str, adapter: nn.Module, serial: bool = False) -> None:
        """Add ``adapter`` under an unused name."""
        _checks.require(name not in self.names(), _OP, "name", "be free", repr(name))
        (self.serial if serial else self.parallel)[name] = adapter.train(self.training)

    def pop(self, name: str) -> nn.Module:
        """Remove and return the adapter of that name; a merged update stays in the weight."""
        _checks.require(name in self.names(), _OP, "name", f"be one of {self.names()}", repr(name))
        return (self.serial if name in self.serial else self.parallel).pop(name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        y = self.layer(x, *args, **kwargs)
        several = isinstance(y, tuple)
        out: torch.Tensor = y[0] if several else y
        merged = self._names if self.merged else ()
        for name, adapter in self.parallel.items():
            if adapter.enabled and name not in merged:
                out = out + adapter(x)
        for adapter in self.serial.values():
            out = adapter(out)
        return (out, *y[1:]) if several else out

    @property
    def merged(self) -> bool:
        if isinstance(self.layer, Mergeable):
            # A layer merged by itself, as by `lora_disabled`, holds no update of ours.
            return self._merge_of is not None and self.layer._undo is self._merge_of
        return self._merge_of is not None

    @torch.no_grad()
    def merge(self, keep_backup: bool = True) -> MergeReport:
        """Add the layer's own update and those of the enabled parallel adapters into its weight, with one rounding.

        Returns    what the rounding lost
        Raises     ValueError: an update that is not one matrix (an `Adapter`, a gate, a task), a layer that is not
                   linear, or merged already; nothing has been changed then.
        """
        _checks.require(not self.merged, _OP, "state", "be unmerged for merge()", "a merged stack")
        _checks.require(keep_backup, _OP, "keep_backup", "be True for a stack", keep_backup)
        acting = {name: each for name, each in self.serial.items() if each.enabled}
        _checks.require(not acting, _OP, "serial", "be empty for merge(): its update is no matrix", [*acting])
        acting = {name: each for name, each in self.parallel.items() if each.enabled}
        for name, each in acting.items():
            rule = "be LoRA for merge(): its update is no matrix"
            _checks.require(isinstance(each, LoRAModule), _OP, f"parallel[{name!r}]", rule, type(each).__name__)
        updates = [update_of(each) for each in acting.values()]
        if isinstance(self.layer, Mergeable):
            if not updates and not self.layer.enabled:
                return MergeReport(0.0, 0.0, self.layer.weight.dtype)
            report = self.layer._merge((), True, updates)
            self._merge_of, self._names = self.layer._undo, tuple(acting)
            return report
        return self._merge_plain(updates, tuple(acting))

    def _merge_plain(self, updates: list[Update], names: tuple[str, ...]) -> MergeReport:
        layer = self.layer
        plain = type(layer) is nn.Linear and "weight" in layer._parameters
        _checks.require(plain, _OP, "layer", "be an nn.Linear or a LoRA layer for merge()", type(layer).__name__)
        assert isinstance(layer, nn.Linear)
        if not updates:
            return MergeReport(0.0, 0.0, layer.weight.dtype)
        update = stacked(updates, wide(layer.weight.dtype))
        fits = update.bias is None or layer.bias is not None
        _checks.require(fits, _OP, "lora_bias", "have a bias of the base to go into", "none")
        merged, report = added(_OP, layer.weight, update.a, update.b, update.scale)
        bias = added_bias(layer.bias, update.bias, update.scale)
        before = {"weight": layer.weight.detach().clone()}
        layer.weight.copy_(merged)
        if update.bias is not None and bias is not None:
            before["bias"] = layer.bias.detach().clone()
            layer.bias.copy_(bias)
        self._merge_of, self._names = before, names
        return report

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base's own bits.

        Raises     ValueError: not merged.
        """
        _checks.require(self.merged, _OP, "state", "be merged for unmerge()", "an unmerged stack")
        if isinstance(self.layer, Mergeable):
            self.layer.unmerge()
        else:
            for name, value in self._merge_of.items():
                self.layer._parameters[name].copy_(value)  # type: ignore[union-attr]
        self._merge_of, self._names = None, ()

    def train(self: _Self, mode: bool = True) -> _Self:
        if mode and self.merged:
            self.unmerge()
        return super().train(mode)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """That of the unmerged stack, always."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.merged and not isinstance(self.layer, Mergeable):
            state.update({f"{prefix}layer.{name}": value for name, value in self._merge_of.items()})
        return state

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.merged:
            self.unmerge()
        super()._load_from_state_dict(*args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = self.__dict__.get("_modules", {}).get("layer")
            if layer is None or name.startswith("__"):
                raise
            return getattr(layer, name)


def update_of(adapter: nn.Module) -> Update:
    """The update of an adapter without a base, as one matrix.

    Raises     ValueError: there is none.
    """
    assert isinstance(adapter, LoRAModule)
    a, b = adapter._pair()
    return Update(a, b, float(adapter.scaling), adapter.lora_bias)
