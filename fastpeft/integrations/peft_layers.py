"""The class that an accelerated PEFT layer has, built at run time from the class it had.

    y = x Wᵀ + bias + Σ_active scale · (dropout(x) Aᵀ Bᵀ + lora_bias)             PEFT's maths, in one operator

`Accelerated` is for ``lora.Linear``; `peft_bnb` has the one for a base of 4 bits. All state stays in PEFT's own
attributes and is read at every call, so that merging, switching, adding, loading, rescaling and hot-swapping adapters
need no notice. Whatever a call cannot prove to be the plain case goes to PEFT's own forward; `peft_report.reason` names
what it was, and has an answer for every branch that steps back here.
"""

from __future__ import annotations

import copy
import copyreg
import types
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import Dropout, Identity, Linear, Parameter
from torch.nn.modules import module as torch_module

from fastpeft.ops import lora_linear

# Exact types only: a subclass (DTensor, a quantised or a traced tensor) may mean something else by the same attributes.
PLAIN = frozenset((torch.Tensor, Parameter))
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
# Base layers that are one matrix product -> whether they store W as [in, out]. `accelerate` adds transformers' Conv1D.
TRANSPOSED: dict[type, bool] = {Linear: False}
# PEFT's class -> what comes before it and its subclasses, where that is not `Accelerated` itself; `accelerate` adds it.
MIXINS: dict[type, type] = {}
# torch never rebinds these dictionaries, so that the names stay true.
_global_hooks = torch_module._global_forward_hooks
_global_pre_hooks = torch_module._global_forward_pre_hooks
_global_backward_hooks = torch_module._global_backward_hooks
_global_backward_pre_hooks = torch_module._global_backward_pre_hooks
_compiling = torch.compiler.is_compiling
_tracing = torch._C._get_tracing_state
_transform = torch._C._functorch.peek_interpreter_stack


def hooked(module: Any) -> bool:
    """Whether calling ``module`` runs more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def globally_hooked() -> bool:
    """Whether torch runs hooks for every module called, which a fused call would not call."""
    return bool(_global_hooks or _global_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks)


def observed(base: Any) -> bool:
    """Whether hooks of ``base`` or of every module, or a `transformed` call, have to see the modules called."""
    return hooked(base) or globally_hooked() or transformed()


def transformed() -> bool:
    """Inside torch.jit.trace, torch.func or forward-mode differentiation, which do not know our operator."""
    return not _compiling() and bool(_tracing() or _transform() or forward_ad._current_level >= 0)


def drop_probability(dropout: Any) -> float | None:
    """p of this call; None where ``dropout`` is a module that we do not know, or drops everything."""
    kind = type(dropout)
    if kind is Identity:
        return 0.0
    if kind is not Dropout:
        return None
    if not dropout.training:
        return 0.0
    return dropout.p if dropout.p < 1.0 else None


def scalable(scale: Any) -> bool:
    """A number, or the 0-d tensor that PEFT's hot-swapping makes of it."""
    if type(scale) in PLAIN:
        return scale.dim() == 0 and not scale.requires_grad
    return isinstance(scale, (int, float))


def adaptable(layer: Any, x: Any, a: Any, b: Any) -> bool:
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


def matching(x: torch.Tensor, w: Any) -> bool:
    """Whether PEFT would multiply x with the base weight without an error."""
    device = x.device
    return type(w) in PLAIN and (w.dtype is x.dtype or torch.is_autocast_enabled(device.type)) and w.device == device


class Accelerated:
    """Comes before PEFT's class in the accelerated class; adds nothing to the instance."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        modules = self._modules
        active = self._active_adapter
        name = active if type(active) is str else active[0] if len(active) == 1 else None
        lora_A = modules["lora_A"]._modules.get(name)
        if args or kwargs or self._disable_adapters or self.merged_adapters:
            return self._plain(x, *args, **kwargs)
        if lora_A is None or name in self.lora_variant:
            y = _several(self, x, active) if name is None else None
            return self._plain(x) if y is None else y
        base = modules["base_layer"]
        lora_B = modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        a = lora_A._parameters.get("weight")
        b = lora_B._parameters.get("weight")
        p = drop_probability(dropout)
        scale = self.scaling[name]
        if (
            p is None
            or type(lora_A) is not Linear
            or type(lora_B) is not Linear
            or not (type(scale) is float or scalable(scale))
            or not adaptable(self, x, a, b)
            or hooked(base)
            or hooked(lora_A)
            or hooked(lora_B)
            or hooked(dropout)
            or globally_hooked()
            or transformed()
        ):
            return self._plain(x)
        y = self._fused(x, base, a, b, lora_B._parameters["bias"], scale, p)
        return self._plain(x) if y is None else y

    def _plain(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own forward."""
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def _fused(
        self, x: torch.Tensor, base: Any, a: Any, b: Any, lora_bias: Any, scale: Any, p: float
    ) -> torch.Tensor | None:
        """The whole layer with one adapter that is `adaptable`; None: the base is not the plain case."""
        transposed = TRANSPOSED.get(type(base))
        w = base._parameters.get("weight")
        if transposed is None or not matching(x, w):
            return None
        bias = base._parameters["bias"]
        return lora_linear(x, w.t() if transposed else w, a, b, bias, lora_bias, scale=scale, dropout=p)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as PEFT's class: what reads the pickle needs no fastpeft."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        # copyreg.__newobj__, the usual function here, lets pickle insist on the object's own class.
        make = copyreg._reconstructor  # type: ignore[attr-defined]
        return make, (source(type(self)), object, None), *reduced[2:]

    def __copy__(self: Any) -> Any:
        """torch's own shallow copy, which ``__reduce_ex__`` would otherwise turn into PEFT's class."""
        twin = self.__class__.__new__(self.__class__)
        twin.__setstate__(self.__getstate__())
        return twin

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        """torch's own deep copy, which ``__reduce_ex__`` would otherwise turn into PEFT's class."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


def _several(layer: Any, x: torch.Tensor, active: list[str]) -> torch.Tensor | None:
    """Several active adapters and no dropout: one adapter of the summed rank. None: not the plain case.

    B takes the scales, which differ between adapters; the ranks need not be equal either.
    """
    modules = layer._modules
    base = modules["base_layer"]
    if observed(base):
        return None
    a_parts: list[torch.Tensor] = []
    b_parts: list[torch.Tensor] = []
    lora_bias = None
    for name in active:
        lora_A = modules["lora_A"]._modules.get(name)
        if lora_A is None:
            continue
        lora_B = modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        a = lora_A._parameters.get("weight")
        b = lora_B._parameters.get("weight")
        scale = layer.scaling[name]
        if (
            name in layer.lora_variant
            or drop_probability(dropout) != 0.0
            or type(lora_A) is not Linear
            or type(lora_B) is not Linear
            or not scalable(scale)
            or not adaptable(layer, x, a, b)
            or hooked(lora_A)
            or hooked(lora_B)
            or hooked(dropout)
            # PEFT casts x to each adapter's dtype in turn, so that an earlier bf16 adapter rounds a later one's x.
            or (a_parts and a.dtype is not a_parts[0].dtype)
        ):
            return None
        a_parts.append(a)
        b_parts.append(b * scale)
        if lora_B._parameters["bias"] is not None:
            scaled = lora_B._parameters["bias"] * scale
            lora_bias = scaled if lora_bias is None else lora_bias + scaled
    if not a_parts:
        return None
    fused: torch.Tensor | None = layer._fused(
        x, base, torch.cat(a_parts), torch.cat(b_parts, dim=1), lora_bias, 1.0, 0.0
    )
    return fused


_built: dict[type, type] = {}
_sources: dict[type, type] = {}


def accelerated(kind: type) -> type:
    """The accelerated class of PEFT's class ``kind``, the same one at every call, under the name that ``kind`` has."""
    if kind not in _built:
        # repr, error messages and logs of PEFT and of its users print these.
        names = {key: vars(kind)[key] for key in ("__module__", "__qualname__", "__doc__") if key in vars(kind)}
        if hasattr(kind, "__deepcopy__"):
            names["__deepcopy__"] = kind.__deepcopy__  # FSDP2 forbids it
        mixin = next((mixin for base, mixin in MIXINS.items() if issubclass(kind, base)), Accelerated)
        built = types.new_class(kind.__name__, (mixin, kind), exec_body=lambda body: body.update(names))
        _built[kind], _sources[built] = built, kind
    return _built[kind]


def source(kind: type) -> type:
    """The class without us: what ``accelerated`` was given, also inside a class built on top since (FSDP2)."""
    if kind not in _sources and issubclass(kind, Accelerated):
        bases = tuple(source(base) for base in kind.__bases__)
        body = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        _sources[kind] = types.new_class(kind.__name__, bases, exec_body=lambda new: new.update(body))
    return _sources.get(kind, kind)
