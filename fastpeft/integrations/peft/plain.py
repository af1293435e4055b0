"""The plain case: the conditions under which one operator computes the same as calling the modules one by one.

Every call tests for whatever a fused call would skip, since it may appear after the layer got our class: hooks,
replaced functions of torch, modes that see each function, transforms that do not know our operators. Each quick test
that runs at every call stands next to the check that words its answer, and the two agree.
"""

from __future__ import annotations

from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import Parameter, functional
from torch.nn.modules import module as torch_module
from torch.nn.modules.dropout import Dropout
from torch.nn.modules.linear import Identity, Linear
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastpeft.integrations.peft.hf_hooks import changes_nothing

# Exact types only: in a subclass (DTensor, a quantised or traced tensor) the same attributes may mean something else.
PLAIN = frozenset((torch.Tensor, Parameter))
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
STRIDED = torch.strided
# torch never rebinds these dictionaries, so these aliases stay valid.
_global_hooks = torch_module._global_forward_hooks
_global_pre_hooks = torch_module._global_forward_pre_hooks
_global_backward_hooks = torch_module._global_backward_hooks
_global_backward_pre_hooks = torch_module._global_backward_pre_hooks
_dynamo = torch.compiler.is_dynamo_compiling
_tracing = torch._C._is_tracing
_transform = torch._C._are_functorch_transforms_active
_function_modes = torch._C._len_torch_function_stack
_function_mode = torch._C._get_function_stack_at
_dispatch_modes = torch._C._len_torch_dispatch_stack


def original(holder: type | ModuleType, name: str) -> Any:
    """``name`` of a class or module as its library defined it; None if another function has been put there.

    A Python function counts as the library's if it comes from the same file as any of its neighbours.
    """
    found = getattr(holder, name)
    if isinstance(found, BuiltinFunctionType):
        return found
    homes = [home for home in getattr(holder, "__mro__", (holder,)) if name in vars(home)]
    beside = [vars(home)[other] for home in homes[:1] for other in vars(home) if other != name]
    files = {other.__code__.co_filename for other in beside if hasattr(other, "__code__")}
    file = getattr(getattr(found, "__code__", None), "co_filename", None)
    return found if not files or file in files else None


def replaced(label: str, holder: type | ModuleType, name: str, expected: Any) -> str | None:
    """The reason to give if ``name`` of the holder is not the expected function, else None."""
    found = getattr(holder, name)
    if found is expected and found is not None:
        return None
    return f"{label}.{name} has been replaced by {getattr(found, '__module__', None) or type(found).__name__}"


_FORWARD = original(Linear, "forward")
_CALL = original(Linear, "__call__")
_LINEAR = original(functional, "linear") if isinstance(functional.linear, BuiltinFunctionType) else None
IDENTITY = original(Identity, "forward")
_DROPOUT = original(Dropout, "forward")
_DROP = original(functional, "dropout")


def hooked(module: Any) -> bool:
    """Whether calling ``module`` runs more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and not changes_nothing(module))
    )


def observed() -> bool:
    """Whether calling modules or torch's functions does more than their own arithmetic, apart from a module's hooks."""
    return bool(
        _global_hooks
        or _global_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
        or Linear.forward is not _FORWARD
        or Linear.__call__ is not _CALL
        or (functional.linear is not _LINEAR and not _same_linear())
        or (_function_modes() and _foreign_function_mode())
        # Dynamo cannot trace these, and none of them is on while it traces.
        or (
            not _dynamo()
            and (
                _tracing()
                or _transform()
                or forward_ad._current_level >= 0
                or (_dispatch_modes() and _foreign_dispatch_mode())
            )
        )
    )


def observer() -> str | None:
    """`observed` in words."""
    if _global_hooks or _global_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks:
        return "global module hooks are registered"
    if _tracing() or _transform() or forward_ad._current_level >= 0:
        return "inside torch.jit.trace, torch.func or forward-mode differentiation"
    mode = _foreign_function_mode() or _foreign_dispatch_mode()
    if mode is not None:
        return f"inside {type(mode).__name__}, a mode that may change what functions of torch do"
    return (
        replaced("torch.nn.Linear", Linear, "forward", _FORWARD)
        or replaced("torch.nn.Linear", Linear, "__call__", _CALL)
        or (None if _same_linear() else replaced("torch.nn.functional", functional, "linear", _LINEAR))
    )


def _same_linear() -> bool:
    """Whether F.linear is ZeRO-3's replacement: the same product, which saves less for backward."""
    return getattr(functional.linear, "__module__", "") == "deepspeed.runtime.zero.linear"


def _foreign_function_mode() -> Any:
    """The first active TorchFunctionMode that is not torch's own default device, which changes no arithmetic."""
    for index in range(_function_modes()):
        mode = _function_mode(index)
        if type(mode) is not DeviceContext:
            return mode
    return None


def _foreign_dispatch_mode() -> Any:
    """The first active TorchDispatchMode that is not torch's: torch's own know every registered operator."""
    for mode in _get_current_dispatch_mode_stack():
        if type(mode).__module__.partition(".")[0] != "torch":
            return mode
    return None


def drop_probability(dropout: Any) -> float | None:
    """p of this call; None if ``dropout`` is an unknown module or drops everything."""
    kind = type(dropout)
    if kind is Identity:
        return 0.0 if Identity.forward is IDENTITY else None
    if kind is not Dropout or Dropout.forward is not _DROPOUT or functional.dropout is not _DROP:
        return None
    if not dropout.training:
        return 0.0
    return dropout.p if dropout.p < 1.0 and not dropout.inplace else None


def undroppable(role: str, dropout: Any) -> str | None:
    """`drop_probability` in words."""
    if drop_probability(dropout) is not None:
        return None
    if type(dropout) not in (Identity, Dropout):
        return f"{role} is a {type(dropout).__name__}"
    return (
        replaced("torch.nn.Identity", Identity, "forward", IDENTITY)
        or replaced("torch.nn.Dropout", Dropout, "forward", _DROPOUT)
        or replaced("torch.nn.functional", functional, "dropout", _DROP)
        or (f"{role} drops everything" if dropout.p >= 1.0 else f"{role} changes its input in place")
    )


def held(module: Any, name: str) -> Any:
    """A parameter of ``module``, or the tensor that FSDP1 puts in its place; `MISSING` if there is neither."""
    parameters = module._parameters
    return parameters[name] if name in parameters else module.__dict__.get(name, MISSING)


def scalable(scale: Any) -> bool:
    """Whether this is a number, or the 0-d tensor that PEFT's hot-swapping makes of one."""
    if type(scale) in PLAIN:
        return scale.dim() == 0 and not scale.requires_grad
    return isinstance(scale, (int, float))


MISSING: Any = object()
"""Stands for a parameter that a module does not have, not even as None."""


def bias_unfit(role: str, bias: Any) -> str | None:
    """Why an operator cannot read this bias; the operator itself refuses a wrong dtype or shape."""
    if bias is None or type(bias) in PLAIN:
        return None
    return f"{role} holds no bias" if bias is MISSING else f"the bias of {role} is a {type(bias).__name__}"
