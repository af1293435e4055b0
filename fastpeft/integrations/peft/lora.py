"""Shared by the kinds whose adapters are two linear modules: PEFT's LoRA on a layer that is one matrix product.

    y = base(x) + Σ_active scale · (dropout(x) Aᵀ Bᵀ + lora_bias)                 PEFT's maths, in one operator

The kind supplies the base: its `AcceleratedLoRA._fused` computes the layer over that base, and the methods of
`LoRAKind` say why it cannot.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from fastpeft.integrations.peft import factors, gathered
from fastpeft.integrations.peft.kind import Accelerated, Kind, nested
from fastpeft.integrations.peft.plain import DTYPES, PLAIN, STRIDED, hooked, observed, observer
from fastpeft.ops.lora_adapter import lora_adapter

_dynamo = torch.compiler.is_dynamo_compiling


class LoRAKind(Kind):
    """`Kind` with the questions about adapters answered; a subclass answers those about the base."""

    def alone(self, layer: Any) -> bool:
        """Whether a call needs only the base and our operator computes that too: no adapter is involved."""
        return False

    @abstractmethod
    def base_changed(self, base: Any) -> str | None:
        """What has changed about the base since `adopt`."""

    @abstractmethod
    def base_unreadable(self, base: Any) -> str | None:
        """What is wrong with the weight of the base, for any input."""

    @abstractmethod
    def base_uncallable(self, layer: Any, x: torch.Tensor, adapter: torch.dtype | None) -> str | None:
        """What the base cannot serve in a call with ``x``; ``adapter``: the dtype of A, None if it does not matter."""

    def any_call(self, layer: Any, names: list[str]) -> str | None:
        """What is wrong with every call of a layer whose state is fine, for any input."""
        return None

    def reason(self, layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        names: list[str] = []
        if args or (kwargs and kwargs.keys() != {"adapter_names"}):
            return f"extra arguments ({', '.join(kwargs) or 'positional'})"
        if not self.alone(layer):
            if layer._disable_adapters:
                return "adapters are disabled"
            if layer.merged_adapters:
                return "adapters are merged into the base weight"
            names = factors.active(layer)
            if kwargs.get("adapter_names") is not None:
                one = factors.named(x, args, kwargs)
                if one is None:
                    return "mixed batch (adapter_names)"
                names = [one] if one in layer.lora_A else []
            if not names:
                return "no active adapter"
        elif kwargs:
            return "extra arguments (adapter_names)"
        base = layer.base_layer
        return (
            # If x is not a tensor at all, `_call` reports it.
            self.slow((x if isinstance(x, torch.Tensor) else base.weight).device.type)
            or nested(base)
            or self.base_changed(base)
            or observer()
            or factors.called("base_layer", base)
            or factors.unreadable(layer, names)
            or self.weights(layer, names)
            or factors.biases_unfit(layer, names)
            or (self.any_call(layer, names) if x is None else self._call(layer, names, x))
        )

    def weights(self, layer: Any, names: list[str]) -> str | None:
        """What is wrong with the weights of the base and of these adapters, for any input."""
        base = layer.base_layer
        parts, _ = factors.modules_of(layer, names)
        found = [] if gathered.gathers(base) else [self.base_unreadable(base)]
        found += [factors.weight_unreadable(role, part) for role, part in parts.items() if not gathered.gathers(part)]
        # "Sharded" is reported last: gathering may solve it, but only if nothing else is wrong.
        whys = sorted((why for why in found if why is not None), key=factors.SHARDED.__eq__)
        if whys:
            return whys[0]
        weights = {role: part.weight for role, part in parts.items()}
        if len({w.dtype for w in weights.values()}) > 1:
            return "the weights of the adapters have different dtypes"
        weights["base_layer"] = base.weight
        if len({w.device for w in weights.values()}) > 1:
            for role, w in weights.items():
                if w.is_meta:
                    return f"the weight of {role} is on the meta device"
            return "the weights are on different devices"
        return None

    def _call(self, layer: Any, names: list[str], x: Any) -> str | None:
        """Why this one call, of a layer whose state is fine, goes to PEFT's forward."""
        if type(x) not in PLAIN or x.layout is not STRIDED or x.is_nested:
            return "the input is not a plain dense tensor"
        if x.dtype not in DTYPES:
            return f"the input is {x.dtype}"
        adapter = layer.lora_A[names[0]].weight.dtype if names else None
        if adapter not in (None, x.dtype) and not layer.cast_input_dtype_enabled:
            return "the input and the adapter have different dtypes and casting the input is disabled"
        if x.device != layer.base_layer.weight.device:
            return "the input is on another device than the weights"
        return self.base_uncallable(layer, x, adapter)


class AcceleratedLoRA(Accelerated):
    """The forward of these kinds: computes the plain case and hands the rest to PEFT."""

    def _served(self: Any, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        if self._disable_adapters or self.merged_adapters:
            return None if args or kwargs else self._alone(x)
        if self._slow and x.device.type in self._slow:
            return None
        modules = self._modules
        base = modules["base_layer"]
        active: Any = self._active_adapter
        if args or kwargs:
            if args or kwargs != {"adapter_names": None}:
                active = factors.named(x, args, kwargs)
            if active is None:
                return None
        of = base.__dict__
        fused = self._fused
        if (
            of["_forward_hooks"]
            or of["_forward_pre_hooks"]
            or of["_backward_hooks"]
            or of["_backward_pre_hooks"]
            or "forward" in of
        ) and hooked(base):
            if _dynamo() or not gathered.gathers(base):
                return None
            fused = _beside
        if observed():
            return None
        name = active if type(active) is str else active[0] if len(active) == 1 else None
        if name is None:
            return self._several(x, base, active, fused)
        if name not in modules["lora_A"]._modules:
            return None
        found = factors.read(self, name, x)
        if found is None:
            return None
        x, a, b, lora_bias, scale, p = found
        y: torch.Tensor | None = fused(x, base, a, b, lora_bias, scale, p)
        return y

    def _alone(self, x: torch.Tensor) -> torch.Tensor | None:
        """The product of the base while adapters are disabled or merged, if ours to compute."""
        return None

    def _fused(
        self, x: torch.Tensor, base: Any, a: Any, b: Any, lora_bias: Any, scale: Any, p: float
    ) -> torch.Tensor | None:
        """The whole layer with one adapter that was read; None: the base is not the plain case."""
        raise NotImplementedError

    def _several(self: Any, x: torch.Tensor, base: Any, active: list[str], fused: Any) -> torch.Tensor | None:
        """Several active adapters. None: not the plain case.

        Adapters without dropout become one adapter of the summed rank; B absorbs their different scales. Each of the
        others draws its own mask, as in PEFT, in the order of the list.
        """
        found: list[Adapter] = []
        for name in active:
            if name in self._modules["lora_A"]._modules:
                read = factors.read(self, name, x)
                # PEFT casts x to each adapter's dtype in turn, so an earlier bf16 adapter rounds x for a later one.
                if read is None or (found and read[1].dtype is not found[0][0].dtype):
                    return None
                x = read[0]
                found.append(read[1:])
        if not found:
            return None
        plain = [each for each in found if not each[-1]]
        dropped = [each for each in found if each[-1]]
        first = _joined(plain) if plain else dropped.pop(0)
        y: torch.Tensor | None = fused(x, base, *first)
        if y is None:
            return None
        for a, b, lora_bias, scale, p in dropped:
            part = lora_adapter(x, a, b, lora_bias, scale=scale, dropout=p)
            y = y + (part if part.dtype is y.dtype else part.to(y.dtype))
        return y


def _beside(x: torch.Tensor, base: Any, a: Any, b: Any, lora_bias: Any, scale: Any, p: float) -> torch.Tensor:
    """The layer over a base that must be called: the base's result plus the adapter's, from one operator."""
    y: torch.Tensor = base(x)
    return (y + lora_adapter(x, a, b, lora_bias, scale=scale, dropout=p)).to(y.dtype)


Adapter = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None", Any, float]


def _joined(found: list[Adapter]) -> Adapter:
    """Adapters without dropout as one."""
    if len(found) == 1:
        return found[0]
    lora_bias = None
    for _, _, bias, scale, _ in found:
        if bias is not None:
            lora_bias = bias * scale if lora_bias is None else lora_bias + bias * scale
    a = torch.cat([each[0] for each in found])
    b = torch.cat([each[1] * each[3] for each in found], dim=1)
    return a, b, lora_bias, 1.0, 0.0
