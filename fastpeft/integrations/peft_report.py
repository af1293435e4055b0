"""Why a PEFT layer is, or is not, computed by our operator; and the report that ``accelerate`` gives."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch.nn import Linear, Module

from fastpeft.integrations import peft_bnb
from fastpeft.integrations import peft_layers as layers

TESTED = (Version("0.20"), Version("0.23"))
"""peft from, up to but not including: the releases whose forwards are known to be the ones that we replace."""

_METHODS = ("forward", "_check_forward_args", "_cast_input_dtype", "merged", "disable_adapters", "active_adapters")


def peft_module(name: str) -> Any:
    """A module of PEFT if somebody has imported it: a model can hold PEFT layers only then."""
    return sys.modules.get(name)


def lora_linear_class() -> Any:
    return getattr(peft_module("peft.tuners.lora.layer"), "Linear", None)


def is_peft_layer(module: Module) -> bool:
    kind = getattr(peft_module("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    return kind is not None and isinstance(module, kind)


def _over_4bit(module: Module) -> bool:
    kind = peft_bnb.linear4bit_class()
    return kind is not None and isinstance(module, kind)


def unfit(module: Module) -> str | None:
    """What keeps ``module`` from being given our class at all; None if it may have it."""
    quantised = _over_4bit(module)
    plain = peft_bnb.linear4bit_class() if quantised else lora_linear_class()
    kind = layers.source(type(module))
    label = f"{kind.__module__.rpartition('.')[0].rpartition('.')[2]}.{kind.__name__}"
    if plain is None or not isinstance(module, plain):
        if label == "lora.Linear8bitLt":
            return f"{label}: bitsandbytes multiplies 8-bit weights in integers, with a threshold for outliers"
        return f"{label} is not PEFT's lora.Linear"
    version = getattr(peft_module("peft"), "__version__", "unknown")
    try:
        known = TESTED[0] <= Version(version) < TESTED[1]
    except InvalidVersion:
        known = False
    if not known:
        return f"peft {version} is outside the tested range >={TESTED[0]},<{TESTED[1]}"
    if plain.forward.__module__ != plain.__module__:
        return f"lora.{plain.__name__}.forward has been replaced by {plain.forward.__module__}"
    if any(getattr(kind, method, None) is not getattr(plain, method) for method in _METHODS):
        return f"{label} has a forward of its own"
    if "forward" in vars(module):
        return "forward has been replaced on the layer itself"
    base = module.base_layer
    if is_peft_layer(base):
        return f"its base layer is itself an adapter layer ({type(base).__name__})"
    if quantised:
        return peft_bnb.unfit(base)
    if type(base) not in layers.TRANSPOSED and not hasattr(base, "parametrizations"):
        return f"base layer {type(base).__module__}.{type(base).__qualname__} is not torch.nn.Linear or Conv1D"
    return None


def _tensors(layer: Any, parts: dict[str, Any]) -> str | None:
    """What is wrong with the weights, whatever the input."""
    quantised = _over_4bit(layer)
    for role, part in parts.items():
        w = part._parameters.get("weight")
        if w is None:
            return f"{role} holds no parameter named weight"
        if hasattr(w, "ds_id"):
            return f"the weight of {role} is partitioned by DeepSpeed"
        if type(w).__name__ == "DTensor":
            return "its weights are sharded (DTensor), unless gathered for the call as FSDP2 does"
        if quantised and role == "base_layer":
            why = peft_bnb.unreadable(part)
            if why is not None:
                return why
            continue
        if type(w) not in layers.PLAIN:
            return f"the weight of {role} is a {type(w).__name__}"
        if w.is_meta:
            return f"the weight of {role} is on the meta device"
        if w.dtype not in layers.DTYPES:
            return f"the weight of {role} is {w.dtype}"
    weights = [part._parameters["weight"] for part in parts.values()]
    if len({w.device for w in weights}) > 1:
        return "the weights are on different devices"
    if len({w.dtype for w in weights[1:]}) > 1:
        return "the weights of the adapters have different dtypes"
    if not quantised and weights[0].dtype is not weights[1].dtype and not layer.cast_input_dtype_enabled:
        return "adapter and base dtype differ and casting the input is disabled"
    return None


def _active(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    active = layer._active_adapter
    return [name for name in ([active] if isinstance(active, str) else active) if name in layer.lora_A]


def _served_alone(layer: Any) -> bool:
    """Whether a call is one of the base, which is ours too over 4 bits: no adapter has a say in it."""
    return _over_4bit(layer) and peft_bnb.is_alone(layer)


def _state(layer: Any) -> str | None:
    """What in the layer's present state sends a call to PEFT's forward."""
    names = []
    if not _served_alone(layer):
        names = _active(layer)
        if layer._disable_adapters:
            return "adapters are disabled"
        if layer.merged_adapters:
            return "adapters are merged into the base weight"
        if not names:
            return "no active adapter"
    parts: dict[str, Any] = {"base_layer": layer.base_layer}
    dropouts: dict[str, Any] = {}
    for name in names:
        if name in layer.lora_variant:
            return f"variant {type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')}"
        if not layers.scalable(layer.scaling[name]):
            return f"scaling is a {type(layer.scaling[name]).__name__} that is neither a number nor a fixed 0-d tensor"
        suffix = "" if len(names) == 1 else f"[{name}]"
        parts |= {f"lora_A{suffix}": layer.lora_A[name], f"lora_B{suffix}": layer.lora_B[name]}
        dropouts[f"lora_dropout{suffix}"] = layer.lora_dropout[name]
    if not _over_4bit(layer) and type(layer.base_layer) not in layers.TRANSPOSED:
        return f"base layer {type(layer.base_layer).__name__} is not torch.nn.Linear or Conv1D (parametrised?)"
    for role, part in parts.items():
        if role != "base_layer" and type(part) is not Linear:
            return f"{role} is a {type(part).__name__}, not torch.nn.Linear"
    for role, part in (parts | dropouts).items():
        if "forward" in vars(part):
            return f"forward of {role} has been replaced"
        if layers.hooked(part):
            return f"{role} has hooks"
    for role, dropout in dropouts.items():
        p = layers.drop_probability(dropout)
        if p is None:
            known = isinstance(dropout, torch.nn.Dropout)
            return f"{role} drops everything" if known else f"{role} is a {type(dropout).__name__}"
        if p and len(names) > 1:
            return "several active adapters with dropout in training"
    return _tensors(layer, parts)


def _call(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What in one call, of a layer whose state is the plain one, sends it to PEFT's forward."""
    w = layer.base_layer.weight
    if args or kwargs:
        return f"extra arguments ({', '.join(kwargs) or 'positional'})"
    if type(x) not in layers.PLAIN or x.is_nested:
        return "the input is not a plain dense tensor"
    if x.dtype not in layers.DTYPES:
        return f"the input is {x.dtype}"
    quantised = _over_4bit(layer)
    if not quantised and x.dtype is not w.dtype and not torch.is_autocast_enabled(x.device.type):
        return "the input and the base weight have different dtypes"
    adapter = x.dtype if _served_alone(layer) else layer.lora_A[_active(layer)[0]].weight.dtype
    if x.dtype is not adapter and not layer.cast_input_dtype_enabled:
        return "the input and the adapter have different dtypes and casting the input is disabled"
    if x.device != w.device:
        return "the input is on another device than the weights"
    return peft_bnb.uncallable(layer.base_layer, x, adapter) if quantised else None


def reason(
    module: Module, x: Any = None, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> str | None:
    """Why a call of this PEFT layer now goes to PEFT's own forward; None if our operator serves it.

    x, args, kwargs    the call in question; without x, only the layer and its present state are judged.
    """
    answer = unfit(module)
    if answer is None and kwargs and kwargs.get("adapter_names") is not None:
        answer = "mixed batch (adapter_names)"
    answer = answer or _state(module)
    if answer is None and layers.globally_hooked():
        answer = "global module hooks are registered"
    if answer is None and layers.transformed():
        answer = "inside torch.jit.trace, torch.func or forward-mode differentiation"
    if answer is None and x is not None:
        answer = _call(module, x, args, kwargs or {})
    return answer


@dataclass
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
            shown = [name or "(the model itself)" for name in names[:3]]
            lines.append("         " + ", ".join(shown) + (f", ... {len(names) - 3} more" if len(names) > 3 else ""))
        return "\n".join(lines)
