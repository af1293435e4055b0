"""A ``forward`` in the module's own dictionary, put or left there by a hook of Hugging Face's accelerate.

``device_map`` gives each module with parameters an ``AlignDevicesHook``: a partial in ``module.forward`` that moves the
arguments to the module's device and calls ``module._old_forward``, the previous bound method. With nothing to move, the
call equals the class's own. Removing a hook leaves that bound method in ``module.forward``.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch


def _own(module: Any, forward: Any, kind: Any) -> bool:
    """Whether ``forward`` is the method of class ``kind``, bound to ``module``."""
    return type(forward) is MethodType and forward.__self__ is module and forward.__func__ is kind.forward


def wraps(module: Any, *kinds: type) -> bool:
    """Whether ``module.forward`` is the method of one of ``kinds``, plain or behind any hook of accelerate."""
    forward = module.__dict__["forward"]
    if type(forward) is partial and len(forward.args) == 1 and forward.args[0] is module and not forward.keywords:
        if getattr(forward.func, "__module__", "") != "accelerate.hooks":
            return False
        forward = module.__dict__.get("_old_forward")
    return any(_own(module, forward, kind) for kind in kinds)


def changes_nothing(module: Any) -> bool:
    """Whether the ``forward`` in the module's dictionary equals its class's for an x on the module's device."""
    kind = type(module)
    if not wraps(module, kind):
        return False
    return _own(module, module.__dict__["forward"], kind) or _idle(module.__dict__.get("_hf_hook"), module)


def _idle(hook: Any, module: Any) -> bool:
    """Whether a hook of accelerate moves nothing if x is on the device of the module's weight."""
    kind = type(hook)
    if kind.__module__ != "accelerate.hooks" or hook.no_grad:
        return False
    if kind.__name__ == "SequentialHook":
        return all(_idle(each, module) for each in hook.hooks)
    weight = module._parameters.get("weight")
    return (
        kind.__name__ == "AlignDevicesHook"
        and not hook.offload
        and hook.execution_device is not None
        and weight is not None
        and _same(torch.device(hook.execution_device), weight.device)
    )


def _same(wanted: torch.device, found: torch.device) -> bool:
    """Whether a tensor on ``found`` stays there under ``.to(wanted)``."""
    if wanted.index is None and found.index is not None and wanted.type == found.type:
        return found.index == torch.get_device_module(found).current_device()
    return wanted == found


def become(module: Any, kind: Any) -> None:
    """Give ``module`` the class ``kind``, and replace its old class's forward in its dictionary by ``kind``'s."""
    kept = [key for key in ("forward", "_old_forward") if _own(module, module.__dict__.get(key), type(module))]
    module.__class__ = kind
    module.__dict__.update({key: MethodType(kind.forward, module) for key in kept})
