"""What a kind of PEFT layer is: the questions that ``accelerate`` and the report ask, and the class that a layer gets.

The class is built at run time from the layer's class, with the kind's mixin before it. All state stays in PEFT's own
attributes and is read at every call, so merging, switching, adding, loading, rescaling and hot-swapping adapters need
no notification. A call that is not provably the plain case goes to PEFT's own forward.
"""

from __future__ import annotations

import sys
import types
from abc import ABC, abstractmethod
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch.nn import Module

from fastpeft.integrations.peft import calls
from fastpeft.integrations.peft.hf_hooks import wraps
from fastpeft.integrations.peft.inplace import InPlace, source
from fastpeft.integrations.peft.plain import original, replaced
from fastpeft.ops._calls import without_kernels

TESTED = (Version("0.20"), Version("0.23"))
"""peft from, up to but not including: the releases whose forwards are known to be the ones that we replace."""

# A layer's class must inherit these from PEFT's own class, or its forward is not the one that we replace.
_METHODS = ("forward", "_check_forward_args", "_cast_input_dtype", "merged", "disable_adapters", "active_adapters")
_BYPASSED = "forward has been replaced on the layer itself"

_dynamo = torch.compiler.is_dynamo_compiling
_records = calls.RECORDS


def imported(module: str, name: str) -> Any:
    """``name`` of a module if it is already imported, else None: then no model can hold its layers."""
    return getattr(sys.modules.get(module), name, None)


def is_peft_layer(module: Module) -> bool:
    kind = imported("peft.tuners.tuners_utils", "BaseTunerLayer")
    return kind is not None and isinstance(module, kind)


def nested(base: Any) -> str | None:
    return f"its base layer is itself an adapter layer ({type(base).__name__})" if is_peft_layer(base) else None


def _devices() -> set[str]:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {"cpu"} if found is None else {"cpu", found.type}


class Kind(ABC):
    """One kind of PEFT layer: one object in one file.

    Every question returns None if our operator may compute, else the reason why not; none changes anything.
    """

    mixin: type[Accelerated]
    """What comes before PEFT's class in the class that the layer gets."""
    launcher: str
    """The operator whose kernels make a layer faster; where only the eager reference can serve it, PEFT does."""

    def __init__(self) -> None:
        self.mixin._kind = self

    @abstractmethod
    def peft_class(self) -> type | None:
        """PEFT's class of these layers, if the module that defines it is imported."""

    def register(self) -> None:
        """Look up what calls compare with: classes of other packages, devices. Only ``accelerate`` calls this."""
        self.mixin._slow = frozenset(device for device in _devices() if self.slow(device))

    def slow(self, device: str) -> str | None:
        """Why our operator gains nothing on this type of device: what each of our kernels needs and lacks there."""
        missing = without_kernels(self.launcher, device) if device in _devices() else None
        return missing and f"only the eager reference can serve on {device}, which is no faster than PEFT ({missing})"

    @abstractmethod
    def adopt(self, layer: Any) -> str | None:
        """Why the layer, whose class and forward are PEFT's own, cannot get our class at all."""

    @abstractmethod
    def reason(self, layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why this call of an adopted layer goes to PEFT's forward; without x (None), why every call does."""


def label(module: Module) -> str:
    """``lora.Linear``: the name by which PEFT's users know the class of a layer."""
    kind = source(type(module))
    return f"{kind.__module__.rpartition('.')[0].rpartition('.')[2]}.{kind.__name__}"


def unfit(kind: Kind, module: Module) -> str | None:
    """Why ``module``, of this kind, cannot get our class at all; None if it can."""
    plain: Any = kind.peft_class()
    own = source(type(module))
    version = imported("peft", "__version__") or "unknown"
    try:
        known = TESTED[0] <= Version(version) < TESTED[1]
    except InvalidVersion:
        known = False
    if not known:
        return f"peft {version} is outside the tested range >={TESTED[0]},<{TESTED[1]}"
    why = replaced(f"lora.{plain.__name__}", plain, "forward", original(plain, "forward"))
    if why is not None:
        return why
    if any(getattr(own, method, None) is not getattr(plain, method) for method in _METHODS):
        return f"{label(module)} has a forward of its own"
    if "forward" in vars(module) and not wraps(module, type(module), own):
        return _BYPASSED
    return nested(module.base_layer) or kind.adopt(module)


def bypassed(module: Module) -> str | None:
    """Whether a forward set on an accelerated layer bypasses ours; not if it wraps ours."""
    found: Any = vars(module).get("forward")
    if found is None or wraps(module, type(module)):
        return None
    while found is not None:
        if isinstance(found, types.MethodType) and found.__self__ is module and found.__func__ is Accelerated.forward:
            return None
        found = getattr(found, "__wrapped__", None)  # what functools.wraps leaves
    return _BYPASSED


def changed(module: Any) -> str | None:
    """Whether the forward of PEFT's class has been replaced since the layer got our class."""
    return replaced(label(module), module._source, "forward", module._replaces[0])


class Accelerated(InPlace):
    """Comes before PEFT's class in the accelerated class; adds nothing to the instance. A kind's mixin computes."""

    _kind: Kind
    _slow: frozenset[str]
    """Types of devices that have no kernel for this kind."""
    _source: Any
    """PEFT's class of the layer."""
    _replaces: tuple[Any]
    """The forward that it had when this class was made; in a tuple, so that no instance binds it as a method."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Accelerated):  # after `restore`, through a kept reference to this method
            return type(self).forward(self, x, *args, **kwargs)
        if _dynamo():
            y = self._served(x, args, kwargs) if self._source.forward is self._replaces[0] else None
            calls.traced(y is not None)
            return self._plain(x, *args, **kwargs) if y is None else y
        if self._source.forward is self._replaces[0]:
            y = self._served(x, args, kwargs)
            if y is not None:
                (_records.get(id(self)) or calls.open_record(self)).served.add()
                return y
        calls.left(self, self._kind.reason(self, x, args, kwargs) or changed(self) or "unknown")
        return self._plain(x, *args, **kwargs)

    def _served(self, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The layer by our operators; None: not the plain case."""
        raise NotImplementedError

    def _plain(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own forward."""
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def _copied_to(self, twin: Any) -> None:
        calls.copied(self, twin)

    @classmethod
    def _given_before(cls, kind: Any) -> None:
        cls._source, cls._replaces = kind, (kind.forward,)
