"""What a kind of PEFT layer is: the questions that ``accelerate`` and the report ask, and the class that a layer gets.

The class is built at run time from the class that the layer had, with the kind's mixin before it. All state stays in
PEFT's own attributes and is read at every call, so that merging, switching, adding, loading, rescaling and hot-swapping
adapters need no notice. Whatever a call cannot prove to be the plain case goes to PEFT's own forward.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import Any

from packaging.version import InvalidVersion, Version
from torch.nn import Module

from fastpeft.integrations.peft.hf_hooks import wraps
from fastpeft.integrations.peft.inplace import InPlace, source

TESTED = (Version("0.20"), Version("0.23"))
"""peft from, up to but not including: the releases whose forwards are known to be the ones that we replace."""

# What a layer's class must have from PEFT's own class for its forward to be the one that we replace.
_METHODS = ("forward", "_check_forward_args", "_cast_input_dtype", "merged", "disable_adapters", "active_adapters")


def imported(module: str, name: str) -> Any:
    """``name`` of a module that somebody has imported, or None: a model can hold its layers only then."""
    return getattr(sys.modules.get(module), name, None)


def is_peft_layer(module: Module) -> bool:
    kind = imported("peft.tuners.tuners_utils", "BaseTunerLayer")
    return kind is not None and isinstance(module, kind)


class Kind(ABC):
    """One kind of PEFT layer, one object in one file.

    Every question answers None for "ours to compute", or the reason why not; none of them changes anything.
    """

    mixin: type[Accelerated]
    """What comes before PEFT's class in the class that the layer gets."""

    @abstractmethod
    def peft_class(self) -> type | None:
        """PEFT's class of these layers, if PEFT's module of it is imported."""

    def register(self) -> None:  # noqa: B027
        """Learn the classes of other packages that a call compares with; ``accelerate`` asks for it, no query does."""

    @abstractmethod
    def adopt(self, layer: Any) -> str | None:
        """What keeps the layer, whose class and forward are PEFT's own, from being given our class at all."""

    @abstractmethod
    def state(self, layer: Any) -> str | None:
        """What in the layer's present state sends a call to PEFT's forward."""

    @abstractmethod
    def call(self, layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """What in one call, of a layer whose `state` is fine, sends it to PEFT's forward."""


def label(module: Module) -> str:
    """``lora.Linear``: how PEFT's users know the class of a layer."""
    kind = source(type(module))
    return f"{kind.__module__.rpartition('.')[0].rpartition('.')[2]}.{kind.__name__}"


def unfit(kind: Kind, module: Module) -> str | None:
    """What keeps ``module``, of this kind, from being given our class at all; None if it may have it."""
    plain: Any = kind.peft_class()
    own = source(type(module))
    version = imported("peft", "__version__") or "unknown"
    try:
        known = TESTED[0] <= Version(version) < TESTED[1]
    except InvalidVersion:
        known = False
    if not known:
        return f"peft {version} is outside the tested range >={TESTED[0]},<{TESTED[1]}"
    if plain.forward.__module__ != plain.__module__:
        return f"lora.{plain.__name__}.forward has been replaced by {plain.forward.__module__}"
    if any(getattr(own, method, None) is not getattr(plain, method) for method in _METHODS):
        return f"{label(module)} has a forward of its own"
    if "forward" in vars(module) and not wraps(module, type(module), own):
        return "forward has been replaced on the layer itself"
    base = module.base_layer
    if is_peft_layer(base):  # type: ignore[arg-type]
        return f"its base layer is itself an adapter layer ({type(base).__name__})"
    return kind.adopt(module)


class Accelerated(InPlace):
    """Comes before PEFT's class in the accelerated class; adds nothing to the instance. A kind's mixin adds forward."""

    def _plain(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own forward."""
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]
