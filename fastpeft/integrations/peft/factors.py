"""How to read A, B, bias, scale and dropout of one active adapter of a PEFT layer; or why they cannot be read.

Only this file reads ``lora_A``, ``lora_B``, ``lora_dropout`` and ``scaling``. `read` runs at every call, `unreadable`
words the reasons for its refusals, and the two agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.linear import Identity, Linear

from fastpeft.integrations.peft import gathered
from fastpeft.integrations.peft.plain import (
    DTYPES,
    IDENTITY,
    MISSING,
    PLAIN,
    STRIDED,
    bias_unfit,
    drop_probability,
    held,
    hooked,
    scalable,
    undroppable,
)

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", Any, float]
"""x, A [R, K], B [N, R], the bias of lora_B, the scale (float or 0-d tensor), p of the dropout. x is the given tensor,
except that `gathered.ask` may extend its graph."""

SHARDED = "its weights are sharded (DTensor), unless gathered for the call as FSDP2 does"

_dynamo = torch.compiler.is_dynamo_compiling


def active(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    names = layer._active_adapter
    return [name for name in ([names] if isinstance(names, str) else names) if name in layer.lora_A]


def named(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The one adapter that ``adapter_names``, PEFT's argument to every layer, gives for all samples of x; or None."""
    names = kwargs.get("adapter_names")
    if args or len(kwargs) != 1 or not isinstance(names, (list, tuple)) or not names or type(x) not in PLAIN:
        return None
    first = names[0]
    fits = x.dim() > 0 and x.shape[0] == len(names)
    return first if fits and type(first) is str and names.count(first) == len(names) else None


def read(layer: Any, name: str, x: Any) -> Factors | None:
    """The factors of the adapter ``name``, which the layer has; None: PEFT's modules must be called."""
    modules = layer._modules
    lora_A = modules["lora_A"]._modules[name]
    lora_B = modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    scale = layer.scaling[name]
    # Each look-up costs here, and a module's attribute takes three times as long as an item of its dictionary. So
    # `hooked` is written out three times.
    of_A, of_B, of_dropout = lora_A.__dict__, lora_B.__dict__, dropout.__dict__
    p = 0.0 if type(dropout) is Identity and Identity.forward is IDENTITY else drop_probability(dropout)
    if (
        p is None
        or name in layer.lora_variant
        or not (type(scale) is float or scalable(scale))
        or (
            (
                of_dropout["_forward_hooks"]
                or of_dropout["_forward_pre_hooks"]
                or of_dropout["_backward_hooks"]
                or of_dropout["_backward_pre_hooks"]
                or "forward" in of_dropout
            )
            and hooked(dropout)
            and not gathered.passes(dropout)
        )
    ):
        return None
    if (
        type(lora_A) is not Linear
        or type(lora_B) is not Linear
        or of_A["_forward_hooks"]
        or of_A["_forward_pre_hooks"]
        or of_A["_backward_hooks"]
        or of_A["_backward_pre_hooks"]
        or of_B["_forward_hooks"]
        or of_B["_forward_pre_hooks"]
        or of_B["_backward_hooks"]
        or of_B["_backward_pre_hooks"]
        or (("forward" in of_A or "forward" in of_B) and (hooked(lora_A) or hooked(lora_B)))
    ):
        asked = _asked(lora_A, lora_B, x)
        if asked is None:
            return None
        x, a, b, bias, bias_A = asked
    else:
        a_parameters, b_parameters = of_A["_parameters"], of_B["_parameters"]
        try:
            a, bias_A = a_parameters["weight"], a_parameters["bias"]
            b, bias = b_parameters["weight"], b_parameters["bias"]
        except KeyError:
            a, bias_A = held(lora_A, "weight"), held(lora_A, "bias")
            b, bias = held(lora_B, "weight"), held(lora_B, "bias")
    if not (
        (type(x) is Tensor or type(x) is Parameter)
        and (type(a) is Parameter or type(a) is Tensor)
        and (type(b) is Parameter or type(b) is Tensor)
        and (bias is None or type(bias) in PLAIN)
        and bias_A is None
    ):
        return None
    # PEFT must accept x with these factors, and one operator must be able to compute them.
    adapter, dtype, device = a.dtype, x.dtype, x.device
    if (
        dtype in DTYPES
        and b.dtype is adapter
        and (adapter is dtype or (adapter in DTYPES and layer.cast_input_dtype_enabled))
        and a.device == device
        and b.device == device
        and x.layout is STRIDED
        and a.layout is STRIDED
        and b.layout is STRIDED
        and not x.is_nested
    ):
        return x, a, b, bias, scale, p
    return None


def _asked(lora_A: Any, lora_B: Any, x: Any) -> tuple[Any, Any, Any, Any, Any] | None:
    """(x, A, B, the biases of B and A) if one of the modules gathers its own; None if the modules must be called."""
    if _dynamo() or not (_linear(lora_A) and _linear(lora_B)):
        return None
    if type(x) not in PLAIN or x.dtype not in DTYPES or x.layout is not STRIDED or lora_A.bias is not None:
        return None  # before any hook has run for nothing
    a, bias_A, x = _ask(lora_A, x)
    b, bias, a = _ask(lora_B, a)
    return x, a, b, bias, bias_A


def _linear(part: Any) -> bool:
    """Whether `_ask` can give the weight of a ``lora_A`` or ``lora_B``."""
    return gathered.factor(part) or (type(part) is Linear and not hooked(part))


def _ask(part: Any, x: torch.Tensor) -> gathered.Asked:
    """The weight and the bias of a `_linear` part, and x; by calling the part if they exist only during its call."""
    return gathered.ask(part, x) if hooked(part) or type(part) is not Linear else (part.weight, part.bias, x)


def modules_of(layer: Any, names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the modules that hold A and B, the dropouts) of these adapters, under the names that a reason uses."""
    parts: dict[str, Any] = {}
    dropouts: dict[str, Any] = {}
    for name in names:
        suffix = "" if len(names) == 1 else f"[{name}]"
        parts |= {f"lora_A{suffix}": layer.lora_A[name], f"lora_B{suffix}": layer.lora_B[name]}
        dropouts[f"lora_dropout{suffix}"] = layer.lora_dropout[name]
    return parts, dropouts


def unreadable(layer: Any, names: list[str]) -> str | None:
    """Why these adapters, all that a call uses, cannot be `read` for any input; says nothing about weights."""
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
        why = undroppable(role, dropout)
        if why is not None:
            return why
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
    return f"{role} is behind a hook of accelerate, {type(hook).__name__}, which may move or change something"


def weight_elsewhere(role: str, part: Any) -> str | None:
    """Who else has the weight of a module that holds A, B or W."""
    w = held(part, "weight")
    if w is None or w is MISSING:
        return f"{role} holds no parameter named weight"
    if hasattr(w, "ds_id"):
        return f"the weight of {role} is partitioned by DeepSpeed"
    return SHARDED if type(w).__name__ == "DTensor" else None


def weight_unreadable(role: str, part: Any) -> str | None:
    """What is wrong, for any input, with the weight of a module that holds A, B or W."""
    why = weight_elsewhere(role, part)
    if why is not None:
        return why
    w = held(part, "weight")
    if type(w) not in PLAIN:
        return f"the weight of {role} is a {type(w).__name__}"
    if w.layout is not STRIDED:
        return f"the weight of {role} is sparse ({w.layout})"
    if w.dtype not in DTYPES:
        return f"the weight of {role} is {w.dtype}"
    return None


def biases_unfit(layer: Any, names: list[str]) -> str | None:
    """What is wrong with the biases of these adapters' modules."""
    for role, part in modules_of(layer, names)[0].items():
        bias = part.bias if gathered.factor(part) else held(part, "bias")
        if role.startswith("lora_A") and bias is not None:
            return f"{role} has a bias" if bias is not MISSING else f"{role} holds no bias"
        why = bias_unfit(role, bias)
        if why is not None:
            return why
    return None
