"""Modules that have their parameters only while they are called: FSDP1's wrapper, FSDP2's units, ZeRO-3's modules.

PEFT's wrap policy makes each ``lora_A`` and ``lora_B`` a unit of FSDP1; ZeRO-3 partitions every module. Their hooks
gather the parameters before the module's forward, free them after it, and reduce the gradients; the hooks do nothing
else to the tensors that pass. The factors of an adapter are small, so `ask` calls such a module for a copy of its
weight: the hooks run as in PEFT's own forward, in PEFT's order, and the gradient of the copy flows back through them.

A base that is a unit of its own is not small: it is called as PEFT calls it, and our operator adds only the adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Linear

from fastpeft.integrations.peft.kind import imported
from fastpeft.integrations.peft.plain import hooked

# Packages whose hooks only gather a module's parameters, matched by the module that defines a hook. (nvtx: DeepSpeed
# wraps some of ZeRO-3's hooks in its own timer, and no other module hooks.)
_GATHERERS = ("torch.distributed.fsdp.", "deepspeed.runtime.zero.", "deepspeed.utils.nvtx")

Asked = tuple[torch.Tensor, "torch.Tensor | None", torch.Tensor]
"""The weight, the bias, and x as the hooks passed it on: the hooks wait for the gradient of that x."""


def _wrapped(part: Any) -> Any:
    """The module inside FSDP1's wrapper; any other module itself."""
    kind = imported("torch.distributed.fsdp", "FullyShardedDataParallel")
    return part._modules["_fsdp_wrapped_module"] if kind is not None and type(part) is kind else part


def _kind(part: Any) -> type:
    """The module's class without the one that FSDP2 builds on top."""
    kind, unit = type(part), imported("torch.distributed.fsdp", "FSDPModule")
    return kind.__bases__[-1] if unit is not None and unit in kind.__bases__ else kind


def _only_gather(part: Any) -> bool:
    """Whether all hooks of ``part`` are from `_GATHERERS`, and calling it runs nothing else but its forward."""
    if part._backward_hooks or part._backward_pre_hooks or "forward" in part.__dict__:
        return False
    hooks = (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
    return all(str(getattr(hook, "__module__", "")).startswith(_GATHERERS) for hook in hooks)


def passes(dropout: Any) -> bool:
    """Whether a module without parameters has no hooks, or only hooks that do nothing."""
    return _only_gather(dropout)


def gathers(part: Any) -> bool:
    """Whether calling ``part`` gathers its own parameters, runs its class's forward, and does nothing else.

    False for a plain module, whose parameters can be read, and for one with hooks or changes by other code.
    """
    inner = _wrapped(part)
    if inner is not part:
        return _only_gather(part) and not hooked(inner)
    return hooked(part) and _only_gather(part)


def factor(part: Any) -> bool:
    """Whether ``part`` is a linear module that `gathers`: one that can be `ask`ed."""
    return _kind(_wrapped(part)) is Linear and gathers(part)


def ask(part: Any, x: torch.Tensor) -> Asked:
    """Copies of the weight and the bias of a `factor`, taken while it is called with ``x``.

    They are copies because the owner frees the gathered memory when the call ends. x passes through because FSDP2 and
    ZeRO-3 reduce a module's gradients once the gradient of its input has arrived; if the hooks change the dtype of x,
    the original x is returned.
    """
    linear = _wrapped(part)
    handed = x

    def give(given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal handed
        # x is not among the results: a hook on a result would be a hook on x, the caller's tensor, one more per call.
        handed = given
        tensors = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
        return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors)

    # A mode that catches F.linear would not do: ZeRO-3 replaces that function. No other thread can call this module
    # meanwhile: its owner keeps one state per module and orders collectives by the order of calls.
    linear.__dict__["forward"] = give
    try:
        weight, *bias = part(x)
    finally:
        del linear.__dict__["forward"]
    return weight, bias[0] if bias else None, handed if handed.dtype is x.dtype else x


def flat(weight: Any) -> bool:
    """Whether FSDP1 holds this parameter, between calls, as part of a flat parameter."""
    return bool(getattr(weight, "_fsdp_flattened", False))


def below_units(model: Any) -> set[Any]:
    """Every module of ``model`` whose parameters ``fully_shard`` gathers when the module or one above it is called."""
    unit = imported("torch.distributed.fsdp", "FSDPModule")
    units = [module for module in model.modules() if unit is not None and isinstance(module, unit)]
    return {module for each in units for module in each.modules()}


def become_plain(layer: Any) -> bool:
    """Whether FSDP2 gathers the sharded parameters of ``layer``, which is `below_units`, into plain tensors.

    It does not if another mesh dimension splits them too (tensor parallelism): only the last dimension may shard, and
    those before it must replicate (HSDP).
    """
    sharded = [w.placements for w in layer.parameters() if hasattr(w, "placements")]
    return all(p[-1].is_shard() and all(each.is_replicate() for each in p[:-1]) for p in sharded)
