"""PEFT's ``lora.Linear4bit``: the same in one operator over the packed bytes that bitsandbytes keeps.

    y = (x Wᵀ + bias) in bitsandbytes' compute dtype + scale · (dropout(x) Aᵀ Bᵀ + lora_bias), in x.dtype

The bytes and their scales are read as views at every call: that takes a few microseconds, cannot go stale, and keeps no
memory that its owner has freed. In eval mode on a CPU bitsandbytes' own forward repacks the weight: that loses bits of
the scales, and the repacked product has no gradient of x. So bitsandbytes' forward is not called for the plain case or
for the base alone (adapters disabled or merged), and `unpacked` keeps it from repacking in calls left to PEFT. fastpeft
does not import bitsandbytes: whoever made the model has.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from fastpeft.integrations.peft import gathered
from fastpeft.integrations.peft.factors import weight_elsewhere
from fastpeft.integrations.peft.inplace import source
from fastpeft.integrations.peft.kind import imported
from fastpeft.integrations.peft.lora import AcceleratedLoRA, LoRAKind
from fastpeft.integrations.peft.plain import (
    DTYPES,
    PLAIN,
    STRIDED,
    bias_unfit,
    held,
    hooked,
    observed,
    original,
    replaced,
)
from fastpeft.ops import Weight4bit, linear4bit, linear4bit_lora, lora_adapter
from fastpeft.ops.weight4bit import NESTED_BLOCK

TESTED = (Version("0.49"), Version("0.51"))
"""bitsandbytes from, up to but not including: the releases whose ``Linear4bit.forward`` is known to match ours."""

# BASES: bitsandbytes' layers that are one product with a 4-bit weight -> whether their bias takes the input's dtype
# (before 0.50) or the product's. WEIGHTS: exact types of that weight: bitsandbytes' own, and what FSDP makes of it.
# `Linear4bitKind.register` adds to both.
BASES: dict[type, bool] = {}
WEIGHTS: set[type] = set(PLAIN)

# Set by `Linear4bitKind.register`: bitsandbytes, its Linear4bit, that class's forward, and the product it calls.
_library: Any = None
_linear4bit: Any = None
_forward: Any = None
_matmul: Any = None

_compiling = torch.compiler.is_compiling
_plain_torch = torch._C.DisableTorchFunctionSubclass


def _version() -> Version | None:
    try:
        return Version(imported("bitsandbytes", "__version__") or "unknown")
    except InvalidVersion:
        return None


def _bases() -> dict[type, bool]:
    """The value of ``BASES`` for the imported bitsandbytes."""
    modules: Any = sys.modules["bitsandbytes.nn.modules"]
    early = (_version() or TESTED[1]) < Version("0.50")
    return dict.fromkeys((modules.Linear4bit, modules.LinearNF4, modules.LinearFP4), early)


def _replaced() -> str | None:
    """Which function of bitsandbytes that our product stands in for has been replaced, if any."""
    kind = imported("bitsandbytes.nn.modules", "Linear4bit")
    library: Any = sys.modules["bitsandbytes"]
    return replaced("bitsandbytes' Linear4bit", kind, "forward", original(kind, "forward")) or replaced(
        "bitsandbytes", library, "matmul_4bit", original(library.autograd._functions, "matmul_4bit")
    )


def state_of(base: Any) -> Any:
    """The weight's QuantState, or the layer's own copy if a wrapper (FSDP) has lost it."""
    state = getattr(held(base, "weight"), "quant_state", None)
    return base.quant_state if state is None else state


def weight_4bit(base: Any) -> Weight4bit | None:
    """The weight of a layer in ``BASES``, over the layer's own tensors; None if bitsandbytes must handle it."""
    w, state = held(base, "weight"), state_of(base)
    if type(w) not in WEIGHTS or state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    with _plain_torch():  # Params4bit sends every attribute through Python
        if not w.is_contiguous():
            return None
        # Not .data, which loses the version counter by which autograd detects that a saved tensor was written to.
        packed = w.detach().view(-1)
        if packed.dtype is not torch.uint8:
            packed = packed.view(torch.uint8)
    scales = [state.absmax]
    if state.nested:
        nested, offset = state.state2, state.offset
        if nested.blocksize != NESTED_BLOCK:
            return None
        if offset.dtype is not torch.float32 or offset.device != state.absmax.device:
            # bitsandbytes reads the offset from JSON in the default dtype that torch has at that moment.
            offset = offset.to(state.absmax.device, torch.float32)
        scales = [state.absmax, nested.code, nested.absmax, offset]
    weight = Weight4bit(packed, scales, state.shape, state.dtype, state.quant_type, state.blocksize)
    return weight if len(weight.shape) == 2 and weight.sound() else None


def _unserved(x: torch.Tensor, adapter: torch.dtype, compute: torch.dtype | None) -> str | None:
    """Why we do not reproduce PEFT's dtypes for this call."""
    dtype, device = x.dtype, x.device.type
    if compute is not None and compute not in DTYPES:
        return f"the compute dtype of base_layer is {compute}"
    if torch.is_autocast_enabled(device):
        amp = torch.get_autocast_dtype(device)
        if dtype is not torch.float32 and dtype is not amp:
            return f"the input is {dtype} under autocast to {amp}"
    elif adapter is not dtype and torch.is_autocast_enabled():
        return "autocast is enabled for another device, and PEFT then does not cast the input"
    return None


def _compute_dtype(base: Any, x: torch.Tensor) -> torch.dtype:
    """The dtype of bitsandbytes' product; the first input settles it, as in bitsandbytes."""
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    compute: torch.dtype | None = base.compute_dtype
    return x.dtype if compute is None else compute


def _operands(base: Any, x: torch.Tensor, adapter: torch.dtype) -> tuple[Weight4bit, Any, torch.dtype] | None:
    """The weight, the bias and the dtype of bitsandbytes' product; None if we do not reproduce it."""
    early = BASES.get(source(type(base)))
    if early is None:
        return None
    weight, bias = weight_4bit(base), held(base, "bias")
    if (
        weight is None
        or _linear4bit.forward is not _forward
        or _library.matmul_4bit is not _matmul
        or weight.shape[1] != x.shape[-1]
        or weight.packed.device != x.device
        or not (bias is None or type(bias) in PLAIN)
        or _unserved(x, adapter, base.compute_dtype) is not None
    ):
        return None
    compute = _compute_dtype(base, x)
    settled = x.dtype if early else compute
    if bias is not None and bias.dtype is not settled and not _compiling():
        bias.data = bias.data.to(settled)  # for good, as bitsandbytes does
    return weight, bias, compute


def is_alone(layer: Any) -> bool:
    """Whether a call needs only the base: adapters are disabled or merged. (If both, PEFT unmerges first.)"""
    return bool(layer.merged_adapters) != bool(layer._disable_adapters)


def base_alone(layer: Any, x: Any) -> torch.Tensor | None:
    """The product of a layer that `is_alone`; None: PEFT's own forward must do it."""
    base = layer._modules["base_layer"]
    if (
        not is_alone(layer)
        or type(x) not in PLAIN
        or x.dtype not in DTYPES
        or x.layout is not STRIDED
        or x.is_nested
        or hooked(base)
        or observed()
    ):
        return None
    operands = _operands(base, x, x.dtype)
    if operands is None:
        return None
    weight, bias, compute = operands
    amp = torch.is_autocast_enabled(x.device.type)
    return linear4bit(x if amp else x.to(compute), weight, bias).to(x.dtype)


class AcceleratedLinear4bit(AcceleratedLoRA):
    """Comes before PEFT's ``lora.Linear4bit``."""

    def _alone(self: Any, x: torch.Tensor) -> torch.Tensor | None:
        return None if self._slow and x.device.type in self._slow else base_alone(self, x)

    def _fused(
        self, x: torch.Tensor, base: Any, a: Any, b: Any, lora_bias: Any, scale: Any, p: float
    ) -> torch.Tensor | None:
        operands = _operands(base, x, a.dtype)
        if operands is None:
            return None
        dtype, (weight, bias, compute) = x.dtype, operands
        if torch.is_autocast_enabled(x.device.type) or compute is dtype:
            y = linear4bit_lora(x, weight, a, b, bias, lora_bias, scale=scale, dropout=p)
        elif compute is torch.float32:
            y = linear4bit_lora(x.to(compute), weight, a, b, bias, lora_bias, scale=scale, dropout=p)
        else:
            # PEFT computes the adapter in its own dtype, not the base's; so do we, for gradients as exact as PEFT's.
            base_y = linear4bit(x.to(compute), weight, bias).to(dtype)
            y = base_y + lora_adapter(x, a, b, lora_bias, scale=scale, dropout=p)
        return y if y.dtype is dtype else y.to(dtype)


class Linear4bitKind(LoRAKind):
    mixin = AcceleratedLinear4bit
    launcher = "linear4bit_fwd"

    def peft_class(self) -> type | None:
        found: type | None = imported("peft.tuners.lora.bnb", "Linear4bit")
        return found

    def register(self) -> None:
        super().register()
        if self.peft_class() is not None:
            global _library, _linear4bit, _forward, _matmul
            _library, _linear4bit = sys.modules["bitsandbytes"], imported("bitsandbytes.nn.modules", "Linear4bit")
            _forward = original(_linear4bit, "forward")
            _matmul = original(_library.autograd._functions, "matmul_4bit")
            BASES.update(_bases())
            WEIGHTS.add(imported("bitsandbytes.nn.modules", "Params4bit"))

    def alone(self, layer: Any) -> bool:
        return is_alone(layer)

    def adopt(self, layer: Any) -> str | None:
        version, base = _version(), layer.base_layer
        if version is None or not TESTED[0] <= version < TESTED[1]:
            found = imported("bitsandbytes", "__version__") or "unknown"
            return f"bitsandbytes {found} is outside the tested range >={TESTED[0]},<{TESTED[1]}"
        why = _replaced()
        if why is not None:
            return why
        if source(type(base)) not in _bases() and not hasattr(base, "parametrizations"):
            return f"base layer {type(base).__module__}.{type(base).__qualname__} is not bitsandbytes' Linear4bit"
        return None

    def base_changed(self, base: Any) -> str | None:
        if source(type(base)) not in _bases():
            return f"base layer {type(base).__name__} is not bitsandbytes' Linear4bit (parametrised?)"
        return _replaced()

    def base_unreadable(self, base: Any) -> str | None:
        why = weight_elsewhere("base_layer", base)
        if why is not None:
            return why
        w, state, bias = held(base, "weight"), state_of(base), held(base, "bias")
        if type(w) not in PLAIN and type(w) is not imported("bitsandbytes.nn.modules", "Params4bit"):
            return f"the weight of base_layer is a {type(w).__name__}"
        why = bias_unfit("base_layer", bias)
        if why is not None:
            return why
        if state is None:
            return "the weight of base_layer has not been quantised yet, or has lost its quant_state"
        if getattr(state, "packing_format_for_cpu", False):
            return (
                "bitsandbytes has repacked the weight for inference on a CPU (a call in eval mode before accelerate): "
                "gradients are wrong until it is unpacked, as state_dict() does"
            )
        if w.is_meta:
            return "the weight of base_layer is on the meta device"
        if weight_4bit(base) is None and not gathered.flat(w):
            return "the quant_state of base_layer does not describe its weight (sharded?)"
        return None

    def base_uncallable(self, layer: Any, x: torch.Tensor, adapter: torch.dtype | None) -> str | None:
        base = layer.base_layer
        shape = list(state_of(base).shape)
        if list(x.shape[-1:]) != shape[1:]:
            return f"the input is {list(x.shape)} for a weight of {shape}"
        return _unserved(x, adapter or x.dtype, base.compute_dtype)


KIND = Linear4bitKind()
