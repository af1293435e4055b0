"""A mergeable module whose base weight is kept in 4 bits: its tensors, its files, its merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn

from fastpeft.nn.layers._bytes import hold_bytes
from fastpeft.nn.merge import Mergeable, MergeReport, Update
from fastpeft.ops import Weight4bit, _checks, dequantize_4bit, quantize_4bit

# bitsandbytes' names in a state dict; the last one is in the JSON bytes there.
_SCALES = ("absmax", "nested_quant_map", "nested_absmax", "nested_offset")

_Self = TypeVar("_Self", bound="Quantized")


class Quantized(Mergeable):
    """A LoRA module over a base ``weight`` of packed bytes [n/2, 1], as in its files, with its scales as buffers."""

    quant_type: str
    block_size: int
    weight_dtype: torch.dtype

    def _hold(self, weight: Weight4bit, assign: bool = True) -> None:
        """Keep the scales of ``weight`` as buffers: copied into existing ones, or themselves if ``assign``."""
        self.quant_type, self.block_size, self.weight_dtype = weight.quant_type, weight.block_size, weight.dtype
        for name, new in zip_longest(_SCALES, weight.scales):
            old = self._buffers.get(name)
            if new is not None and not assign:
                if old is not None and (old.shape, old.dtype) == (new.shape, new.dtype):
                    old.copy_(new)
                    continue
                new = new.to(self.weight.device, copy=True)
            # Not persistent: the state dict has them in bitsandbytes' form.
            self.register_buffer(name, new, persistent=False)
        hold_bytes(self, "weight")

    def weight_4bit(self) -> Weight4bit:
        """The weight as the operators take it, on the module's own tensors; merged if the module is."""
        held, buffers = self._parameters, self._buffers
        scales: Any = [buffers["absmax"]]
        if buffers["nested_offset"] is not None:
            scales = [buffers[name] for name in _SCALES]
        packed: Any = held["weight"]
        shape = torch.Size((self.out_features, self.in_features))
        return Weight4bit(packed, scales, shape, self.weight_dtype, self.quant_type, self.block_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The base weight [N, K] in ``dtype``, default that of the original; with the update if it is merged."""
        return dequantize_4bit(self.weight_4bit(), dtype)

    def merge(self, keep_backup: bool = True) -> MergeReport:
        """W ← W + scaling · B A, quantised again, and bias ← bias + scaling · lora_bias; the rest as in LoRALinear.

        keep_backup    must be True: no subtraction recovers the packed base, and its copy takes a byte for two elements
        Returns    the loss by quantising again; its relative error is often above 1, because a step of 4 bits is larger
                   than most updates. ``to_linear`` merges without that loss.
        Raises     ValueError: merged already, disabled, or a sum that is not finite; nothing has been changed then.
        """
        return self._merge((), keep_backup)

    def _merge(self, condition: tuple[Any, ...], keep_backup: bool, more: Sequence[Update] = ()) -> MergeReport:
        _checks.require(keep_backup, self._op, "keep_backup", "be True over a base of 4 bits", keep_backup)
        return super()._merge(condition, True, more)

    def _added(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> tuple[Weight4bit, MergeReport]:
        exact = self.dequantize(torch.float32)
        update = (b.float() @ a.float()) * scale
        exact += update
        _checks.require(bool(exact.isfinite().all()), self._op, "weight", "stay finite with the update", "inf or nan")
        merged = quantize_4bit(exact, self.quant_type, self.block_size, self.weight_4bit().double_quant)
        merged.dtype = self.weight_dtype
        total = update.norm().item()
        error = dequantize_4bit(merged, out=update).sub_(exact)
        relative = error.norm().item() / total if total else 0.0
        return merged, MergeReport(error.abs().max().item(), relative, torch.uint8)

    def _backup(self) -> Weight4bit:
        return self.weight_4bit().map(lambda tensor: tensor.detach().clone())

    def _write_weight(self, weight: Weight4bit) -> None:
        self.weight.copy_(weight.packed.view_as(self.weight))
        self._hold(weight, assign=False)

    def _base_dtype(self) -> torch.dtype:
        return self.weight_dtype

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A new nn.Linear that computes what this module computes in eval mode, rounded once to ``dtype``.

        dtype      default: that of the original weight
        """
        return self._as_linear(self.dequantize(torch.float32), dtype or self.weight_dtype, False)

    def _apply(self: _Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Self:
        backup = None if self._undo is None else self._undo.weight
        fixed = [w for w in (self.weight_4bit(), backup) if w is not None]
        held = {id(tensor) for w in fixed for tensor in (w.packed, *w.scales)}

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            out = fn(tensor)
            return tensor.to(out.device) if id(tensor) in held and out.dtype != tensor.dtype else out

        super()._apply(moved, recurse)
        hold_bytes(self, "weight")
        if self._undo is not None:
            self._undo.weight = self._undo.weight.map(moved)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        hold_bytes(self, "weight")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.weight_4bit() if self._undo is None else self._undo.weight
        if self._undo is not None:
            destination[prefix + "weight"] = weight.packed
        destination.update({f"{prefix}weight.{name}": part for name, part in weight.to_parts().items()})

    def _fqn_modifiers(self) -> dict[str, str]:
        """Where torch.distributed.checkpoint.state_dict looks for ``weight``.

        It resolves every key attribute by attribute, and a Parameter has no ``absmax``. It does not use what it finds.
        """
        return {"weight": "_keys"}

    @property
    def _keys(self) -> SimpleNamespace:
        """An attribute for every key that begins with ``weight``."""
        weight = SimpleNamespace(quant_state=SimpleNamespace())
        for name in self.weight_4bit().part_names():
            *path, last = name.split(".")
            setattr(weight.quant_state if path else weight, last, None)
        return SimpleNamespace(weight=weight)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        dotted = prefix + "weight."
        parts = {key.removeprefix(dotted): value for key, value in state_dict.items() if key.startswith(dotted)}
        rest = {key: value for key, value in state_dict.items() if not key.startswith(dotted)}
        data, weight = rest.pop(prefix + "weight", None), None
        try:
            if prefix + "weight" in state_dict:
                _checks.tensor(self._op, "weight", data)
            if data is not None or (parts and not self._has(parts)):
                weight = self._read(data, parts)
                rest[prefix + "weight"] = weight.packed.view_as(self.weight)
            for name, parameter in self._parameters.items():
                if prefix + name in rest and parameter is not None:
                    value = rest[prefix + name]
                    _checks.tensor(self._op, name, value)
                    shape = list(parameter.shape)
                    _checks.require(
                        value.shape == parameter.shape, self._op, name, f"have shape {shape}", list(value.shape)
                    )
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}: {error}" if prefix else str(error))
            return
        if weight is None and not parts:
            missing_keys.extend(dotted + name for name in self.weight_4bit().part_names())
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if weight is not None:
            self._hold(weight, bool(local_metadata.get("assign_to_params_buffers", False)))

    def _has(self, parts: dict[str, torch.Tensor]) -> bool:
        """Whether ``parts`` belong to the current weight: a state dict of what trains has them without it."""
        held = (self.weight_4bit() if self._undo is None else self._undo.weight).to_parts()
        return held.keys() == parts.keys() and all(
            isinstance(part, torch.Tensor) and not part.is_meta and torch.equal(part.to(held[name].device), held[name])
            for name, part in parts.items()
        )

    def _read(self, data: torch.Tensor | None, parts: dict[str, torch.Tensor]) -> Weight4bit:
        """The weight of a state dict; raises ValueError, TypeError if it does not fit this module."""
        floats = data is not None and not parts and data.is_floating_point()
        rule = "be quantised in a state dict: load the floats into the layer that from_linear is given"
        _checks.require(not floats, self._op, "weight", rule, getattr(data, "dtype", None))
        _checks.require(data is not None, self._op, "weight", "come with its parts", f"only {sorted(parts)}")
        assert data is not None
        weight = Weight4bit.from_parts(data, parts)
        shape = (self.out_features, self.in_features)
        _checks.require(weight.shape == shape, self._op, "weight", f"have shape {list(shape)}", list(weight.shape))
        return weight
