"""What the kinds share whose adapters are two linear modules: PEFT's LoRA on a layer that is one matrix product.

    y = base(x) + Σ_active scale · (dropout(x) Aᵀ Bᵀ + lora_bias)                 PEFT's maths, in one operator

The kind supplies the base: `AcceleratedLoRA._fused` computes the layer over it, and the methods of `LoRAKind` word what
keeps it from that.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from fastpeft.integrations.peft import factors, gathered
from fastpeft.integrations.peft.kind import Accelerated, Kind
from fastpeft.integrations.peft.plain import DTYPES, PLAIN, globally_hooked, observed, transformed
from fastpeft.ops.lora_adapter import lora_adapter


class LoRAKind(Kind):
    """`Kind` with the questions about adapters answered; what is left is the base."""

    def alone(self, layer: Any) -> bool:
        """Whether a call is one of the base that is ours too: no adapter has a say in it."""
        return False

    @abstractmethod
    def base_changed(self, base: Any) -> str | None:
        """What the base has become since `adopt`."""

    @abstractmethod
    def base_unreadable(self, base: Any) -> str | None:
        """What is wrong with the weight of the base, whatever the input."""

    @abstractmethod
    def base_uncallable(self, layer: Any, x: torch.Tensor, adapter: torch.dtype | None) -> str | None:
        """What in a call with ``x`` the base cannot serve; ``adapter``: the dtype of A, None where it has no say."""

    def state(self, layer: Any) -> str | None:
        names: list[str] = []
        if not self.alone(layer):
            names = factors.active(layer)
            if layer._disable_adapters:
                return "adapters are disabled"
            if layer.merged_adapters:
                return "adapters are merged into the base weight"
            if not names:
                return "no active adapter"
        base = layer.base_layer
        return (
            self.base_changed(base)
            or factors.called("base_layer", base)
            or factors.unreadable(layer, names)
            or self.weights(layer, names)
        )

    def weights(self, layer: Any, names: list[str]) -> str | None:
        """What is wrong with the weights of the base and of these adapters, whatever the input."""
        base = layer.base_layer
        parts, _ = factors.modules_of(layer, names)
        found = [] if gathered.gathers(base) else [self.base_unreadable(base)]
        found += [factors.weight_unreadable(role, part) for role, part in parts.items() if not gathered.gathers(part)]
        # That weights are sharded comes last: where they will be gathered, nothing else may be wrong.
        whys = sorted((why for why in found if why is not None), key=factors.SHARDED.__eq__)
        if whys:
            return whys[0]
        weights = [part.weight for part in parts.values()]
        if len({w.device for w in (base.weight, *weights)}) > 1:
            return "the weights are on different devices"
        if len({w.dtype for w in weights}) > 1:
            return "the weights of the adapters have different dtypes"
        return None

    def call(self, layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if args or kwargs:
            return f"extra arguments ({', '.join(kwargs) or 'positional'})"
        if type(x) not in PLAIN or x.is_nested:
            return "the input is not a plain dense tensor"
        if x.dtype not in DTYPES:
            return f"the input is {x.dtype}"
        adapter = None if self.alone(layer) else layer.lora_A[factors.active(layer)[0]].weight.dtype
        if adapter not in (None, x.dtype) and not layer.cast_input_dtype_enabled:
            return "the input and the adapter have different dtypes and casting the input is disabled"
        if x.device != layer.base_layer.weight.device:
            return "the input is on another device than the weights"
        return self.base_uncallable(layer, x, adapter)


class AcceleratedLoRA(Accelerated):
    """The forward of these kinds: reads the plain case, and hands the rest to PEFT."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        active = self._active_adapter
        name = active if type(active) is str else active[0] if len(active) == 1 else None
        if args or kwargs or self._disable_adapters or self.merged_adapters:
            return self._plain(x, *args, **kwargs)
        modules = self._modules
        base = modules["base_layer"]
        fused = self._fused if not observed(base) else _beside if _apart(base) else None
        y = None
        if fused is not None:
            if name is None:
                y = _several(self, x, base, active, fused)
            elif name in modules["lora_A"]._modules:
                found = factors.read(self, name, x)
                if found is not None:
                    x, *rest = found
                    y = fused(x, base, *rest)
        return self._plain(x) if y is None else y

    def _fused(
        self, x: torch.Tensor, base: Any, a: Any, b: Any, lora_bias: Any, scale: Any, p: float
    ) -> torch.Tensor | None:
        """The whole layer with one adapter that could be read; None: the base is not the plain case."""
        raise NotImplementedError


def _apart(base: Any) -> bool:
    """Whether the base has to be called, and only to gather its own weight."""
    return gathered.gathers(base) and not (globally_hooked() or transformed() or torch.compiler.is_compiling())


def _beside(x: torch.Tensor, base: Any, a: Any, b: Any, lora_bias: Any, scale: Any, p: float) -> torch.Tensor:
    """The layer over a base that must be called: its result, and the adapter's from one operator."""
    y: torch.Tensor = base(x)
    return (y + lora_adapter(x, a, b, lora_bias, scale=scale, dropout=p)).to(y.dtype)


def _several(layer: Any, x: torch.Tensor, base: Any, active: list[str], fused: Any) -> torch.Tensor | None:
    """Several active adapters and no dropout: one adapter of the summed rank. None: not the plain case.

    B takes the scales, which differ between adapters; the ranks need not be equal either.
    """
    a_parts: list[torch.Tensor] = []
    b_parts: list[torch.Tensor] = []
    lora_bias = None
    for name in active:
        if name not in layer._modules["lora_A"]._modules:
            continue
        found = factors.read(layer, name, x)
        if found is None:
            return None
        x, a, b, bias, scale, p = found
        # PEFT casts x to each adapter's dtype in turn, so that an earlier bf16 adapter rounds a later one's x.
        if p or (a_parts and a.dtype is not a_parts[0].dtype):
            return None
        a_parts.append(a)
        b_parts.append(b * scale)
        if bias is not None:
            scaled = bias * scale
            lora_bias = scaled if lora_bias is None else lora_bias + scaled
    if not a_parts:
        return None
    y: torch.Tensor | None = fused(x, base, torch.cat(a_parts), torch.cat(b_parts, dim=1), lora_bias, 1.0, 0.0)
    return y
