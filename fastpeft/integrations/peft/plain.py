"""The plain case: what a call must be for one operator to compute what the modules called one by one would."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import Dropout, Identity, Parameter
from torch.nn.modules import module as torch_module

from fastpeft.integrations.peft.hf_hooks import changes_nothing

# Exact types only: a subclass (DTensor, a quantised or a traced tensor) may mean something else by the same attributes.
PLAIN = frozenset((torch.Tensor, Parameter))
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
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
        or ("forward" in module.__dict__ and not changes_nothing(module))
    )


def globally_hooked() -> bool:
    """Whether torch runs hooks for every module called, which a fused call would not call."""
    return bool(_global_hooks or _global_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks)


def transformed() -> bool:
    """Inside torch.jit.trace, torch.func or forward-mode differentiation, which do not know our operator."""
    return not _compiling() and bool(_tracing() or _transform() or forward_ad._current_level >= 0)


def observed(base: Any) -> bool:
    """Whether hooks of ``base`` or of every module, or a `transformed` call, have to see the modules called."""
    return hooked(base) or globally_hooked() or transformed()


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


def held(module: Any, name: str) -> Any:
    """A parameter of ``module``, or the tensor that FSDP1 has put in its place; None if there is none."""
    parameters = module._parameters
    return parameters[name] if name in parameters else module.__dict__.get(name)


def matching(x: torch.Tensor, w: Any) -> bool:
    """Whether PEFT would multiply x with the base weight without an error."""
    device = x.device
    return type(w) in PLAIN and (w.dtype is x.dtype or torch.is_autocast_enabled(device.type)) and w.device == device
