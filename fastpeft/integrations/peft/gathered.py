"""Modules that have their parameters only while they are called: FSDP1's wrapper, FSDP2's units, ZeRO-3's modules.

PEFT's wrap policy makes each ``lora_A`` and ``lora_B`` a unit of FSDP1; ZeRO-3 partitions every module. Their hooks
gather the parameters before the module's forward, free them after it, and reduce the gradients; they do nothing else to
the tensors that pass. The factors of an adapter are small, so `ask` calls such a module for a copy of its weight: the
hooks run as in PEFT's own forward, in PEFT's order, and the gradient of the copy flows back through them.

A base that is a unit of its own is not small. It is called as PEFT calls it, and only the adapter is our operator's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Linear

from fastpeft.integrations.peft.kind import imported
from fastpeft.integrations.peft.plain import hooked

# The packages whose hooks gather a module's parameters and do nothing else to what passes. A hook's own module.
# (DeepSpeed times some of ZeRO-3's in a wrapper of its own, and no other hooks of modules.)
_GATHERERS = ("torch.distributed.fsdp.", "deepspeed.runtime.zero.", "deepspeed.utils.nvtx")

Asked = tuple[torch.Tensor, "torch.Tensor | None", torch.Tensor]
"""The weight, the bias, and x as the hooks have handed it on: its gradient is what they wait for."""


def _wrapped(part: Any) -> Any:
    """What FSDP1 has wrapped; any other module itself."""
    kind = imported("torch.distributed.fsdp", "FullyShardedDataParallel")
    return part._modules["_fsdp_wrapped_module"] if kind is not None and type(part) is kind else part


def _kind(part: Any) -> type:
    """The class below the one that FSDP2 builds on top."""
    kind, unit = type(part), imported("torch.distributed.fsdp", "FSDPModule")
    return kind.__bases__[-1] if unit is not None and unit in kind.__bases__ else kind


def _only_gather(part: Any) -> bool:
    """Whether the hooks of ``part`` are those of `_GATHERERS`, and calling it runs nothing else beside its forward."""
    if part._backward_hooks or part._backward_pre_hooks or "forward" in part.__dict__:
        return False
    hooks = (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
    return all(str(getattr(hook, "__module__", "")).startswith(_GATHERERS) for hook in hooks)


def passes(dropout: Any) -> bool:
    """Whether the hooks of a module without parameters, if any, would do nothing."""
    return _only_gather(dropout)


def gathers(part: Any) -> bool:
    """Whether ``part`` gathers its own parameters when it is called, and does nothing else beside its class's forward.

    False for a plain module, whose parameters can be read, and for one that somebody else watches or changes.
    """
    inner = _wrapped(part)
    if inner is not part:
        return _only_gather(part) and not hooked(inner)
    return hooked(part) and _only_gather(part)


def factor(part: Any) -> bool:
    """Whether ``part`` is a linear module that `gathers`: one that can be `ask`ed."""
    return _kind(_wrapped(part)) is Linear and gathers(part)


def ask(part: Any, x: torch.Tensor) -> Asked:
    """Copies of the weight and the bias of a `factor`, had from its own call with ``x``.

    A copy, because the owner frees the gathered memory when the call ends. x goes through, because FSDP2 and ZeRO-3
    reduce the gradients of a module when the gradient of its input has come; it comes back as it was where the hooks
    change its dtype.
    """
    linear = _wrapped(part)
    handed = x

    def give(given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal handed
        # Not among the results: hooks on a result would be hooks on x, one more at every call of a caller's own tensor.
        handed = given
        tensors = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
        return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors)

    # Not a mode that catches F.linear: ZeRO-3 replaces that function. No other thread can call this module meanwhile:
    # its owner keeps one state for a module, and orders collectives by the order of calls.
    linear.__dict__["forward"] = give
    try:
        weight, *bias = part(x)
    finally:
        del linear.__dict__["forward"]
    return weight, bias[0] if bias else None, handed if handed.dtype is x.dtype else x


def flat(weight: Any) -> bool:
    """Whether FSDP1 holds this parameter between two calls, as a part of one flat parameter."""
    return bool(getattr(weight, "_fsdp_flattened", False))


def below_units(model: Any) -> set[Any]:
    """Every module of ``model`` whose parameters ``fully_shard`` gathers when the module or one above it is called."""
    unit = imported("torch.distributed.fsdp", "FSDPModule")
    units = [module for module in model.modules() if unit is not None and isinstance(module, unit)]
    return {module for each in units for module in each.modules()}


def become_plain(layer: Any) -> bool:
    """Whether FSDP2 gathers the sharded parameters of ``layer``, which is `below_units`, to plain tensors.

    Not where another dimension of the mesh splits them too (tensor parallelism): the last dimension shards, and those
    before it replicate (HSDP).
    """
    sharded = [w.placements for w in layer.parameters() if hasattr(w, "placements")]
    return all(p[-1].is_shard() and all(each.is_replicate() for each in p[:-1]) for p in sharded)
