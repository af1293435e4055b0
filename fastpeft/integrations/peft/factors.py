"""How one active adapter of a PEFT layer gives a call its A, B, bias, scale and dropout; or why it does not.

The one place that reads ``lora_A``, ``lora_B``, ``lora_dropout`` and ``scaling``. `read` is on the way of every call,
`unreadable` words what it may find, and the two agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Dropout, Linear

from fastpeft.integrations.peft import gathered
from fastpeft.integrations.peft.plain import DTYPES, PLAIN, drop_probability, held, hooked, scalable

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", Any, float]
"""x, A [R, K], B [N, R], the bias of lora_B, the scale (float or 0-d tensor), p of the dropout. x is the one given, but
for what `gathered.ask` adds to its graph."""

SHARDED = "its weights are sharded (DTensor), unless gathered for the call as FSDP2 does"

_compiling = torch.compiler.is_compiling


def active(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    names = layer._active_adapter
    return [name for name in ([names] if isinstance(names, str) else names) if name in layer.lora_A]


def read(layer: Any, name: str, x: Any) -> Factors | None:
    """The factors of the adapter ``name``, which the layer has; None: PEFT's modules must be called."""
    modules = layer._modules
    lora_A = modules["lora_A"]._modules[name]
    lora_B = modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    p = drop_probability(dropout)
    scale = layer.scaling[name]
    if (
        p is None
        or name in layer.lora_variant
        or not (type(scale) is float or scalable(scale))
        or (hooked(dropout) and not gathered.passes(dropout))
    ):
        return None
    a: Any
    b: Any
    bias: Any
    if type(lora_A) is Linear and type(lora_B) is Linear and not (hooked(lora_A) or hooked(lora_B)):
        a, b, bias = lora_A._parameters.get("weight"), lora_B._parameters.get("weight"), lora_B._parameters["bias"]
    elif _linear(lora_A) and _linear(lora_B) and type(x) in PLAIN and x.dtype in DTYPES and not _compiling():
        a, _, x = _ask(lora_A, x)
        b, bias, a = _ask(lora_B, a)
    else:
        return None
    return (x, a, b, bias, scale, p) if _adaptable(layer, x, a, b) else None


def _linear(part: Any) -> bool:
    """Whether `_ask` can give the weight of a ``lora_A`` or ``lora_B``."""
    return gathered.factor(part) or (type(part) is Linear and not hooked(part))


def _ask(part: Any, x: torch.Tensor) -> gathered.Asked:
    """The weight and the bias of a `_linear` part, and x, by the part's own call where only that has them."""
    return gathered.ask(part, x) if hooked(part) or type(part) is not Linear else (part.weight, part.bias, x)


def _adaptable(layer: Any, x: Any, a: Any, b: Any) -> bool:
    """Whether PEFT would multiply x with these factors without an error, and one operator can."""
    if type(x) not in PLAIN or type(a) not in PLAIN or type(b) not in PLAIN:
        return False
    adapter, device = a.dtype, x.device
    return (
        x.dtype in DTYPES
        and adapter in DTYPES
        and b.dtype is adapter
        and (adapter is x.dtype or layer.cast_input_dtype_enabled)
        and a.device == device
        and b.device == device
        and not x.is_nested
    )


def modules_of(layer: Any, names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the modules that hold A and B, the dropouts) of these adapters, under the words of a reason."""
    parts: dict[str, Any] = {}
    dropouts: dict[str, Any] = {}
    for name in names:
        suffix = "" if len(names) == 1 else f"[{name}]"
        parts |= {f"lora_A{suffix}": layer.lora_A[name], f"lora_B{suffix}": layer.lora_B[name]}
        dropouts[f"lora_dropout{suffix}"] = layer.lora_dropout[name]
    return parts, dropouts


def unreadable(layer: Any, names: list[str]) -> str | None:
    """What keeps these adapters, all that are active, from being `read`, whatever the input; weights apart."""
    for name in names:
        if name in layer.lora_variant:
            return f"variant {type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')}"
        if not scalable(layer.scaling[name]):
            return f"scaling is a {type(layer.scaling[name]).__name__} that is neither a number nor a fixed 0-d tensor"
    parts, dropouts = modules_of(layer, names)
    for role, part in parts.items():
        if type(part) is not Linear and not gathered.factor(part):
            return f"{role} is a {type(part).__name__}, not torch.nn.Linear"
    for role, part in (parts | dropouts).items():
        why = called(role, part)
        if why is not None:
            return why
    for role, dropout in dropouts.items():
        p = drop_probability(dropout)
        if p is None:
            known = isinstance(dropout, Dropout)
            return f"{role} drops everything" if known else f"{role} is a {type(dropout).__name__}"
        if p and len(names) > 1:
            return "several active adapters with dropout in training"
    return None


def called(role: str, part: Any) -> str | None:
    """What calling this module would do beyond its class's forward."""
    if not hooked(part) or gathered.gathers(part):
        return None
    if "forward" not in vars(part):
        return f"{role} has hooks"
    hook = getattr(part, "_hf_hook", None)
    if hook is None:
        return f"forward of {role} has been replaced"
    return f"{role} has a {type(hook).__name__} of accelerate, which may move or change something"


def weight_elsewhere(role: str, part: Any) -> str | None:
    """Who else has the weight of a module that holds A, B or W."""
    w = held(part, "weight")
    if w is None:
        return f"{role} holds no parameter named weight"
    if hasattr(w, "ds_id"):
        return f"the weight of {role} is partitioned by DeepSpeed"
    return SHARDED if type(w).__name__ == "DTensor" else None


def weight_unreadable(role: str, part: Any) -> str | None:
    """What is wrong with the weight of a module that holds A, B or W, whatever the input."""
    why = weight_elsewhere(role, part)
    if why is not None:
        return why
    w = held(part, "weight")
    if type(w) not in PLAIN:
        return f"the weight of {role} is a {type(w).__name__}"
    if w.is_meta:
        return f"the weight of {role} is on the meta device"
    if w.dtype not in DTYPES:
        return f"the weight of {role} is {w.dtype}"
    return None
