"""Put a class before a module's own, in place: a subclass built once at run time, under the original class's name.

Nothing else of the module changes: parameters, buffers, keys, attributes, saved files and ``isinstance`` stay.
"""

from __future__ import annotations

import copy
import copyreg
import types
from typing import Any


class InPlace:
    """Base of classes given in place: copies keep it, pickles name the original class; the instance gains nothing."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the original class, so that reading the pickle needs no fastpeft."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        # Not copyreg.__newobj__, the usual function here: with it pickle insists on the object's own class.
        make = copyreg._reconstructor  # type: ignore[attr-defined]
        return make, (source(type(self)), object, None), *reduced[2:]

    def __copy__(self: Any) -> Any:
        """torch's own shallow copy; through ``__reduce_ex__`` the copy would have the original class."""
        twin = self.__class__.__new__(self.__class__)
        twin.__setstate__(self.__getstate__())
        self._copied_to(twin)
        return twin

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        """torch's own deep copy; through ``__reduce_ex__`` the copy would have the original class."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        self._copied_to(twin)
        return twin

    def _copied_to(self, twin: Any) -> None:
        """Called with each new copy."""

    @classmethod
    def _given_before(cls, kind: type) -> None:
        """Called once when this class is built, with the original class ``kind``."""


_built: dict[tuple[type, type], type] = {}
_sources: dict[type, type] = {}


def built(mixin: type[InPlace], kind: type) -> type:
    """The class with ``mixin`` before ``kind``, under the name of ``kind``; the same class at every call."""
    key = (mixin, kind)
    if key not in _built:
        # The library's and its users' reprs, error messages and logs print these.
        names = {name: vars(kind)[name] for name in ("__module__", "__qualname__", "__doc__") if name in vars(kind)}
        if hasattr(kind, "__deepcopy__"):
            names["__deepcopy__"] = kind.__deepcopy__  # FSDP2 forbids it
        made: Any = types.new_class(kind.__name__, (mixin, kind), exec_body=lambda body: body.update(names))
        made._given_before(kind)
        _built[key], _sources[made] = made, kind
    return _built[key]


def source(kind: type) -> type:
    """The original class that ``built`` was given, even under a class added on top since (FSDP2)."""
    if kind not in _sources and issubclass(kind, InPlace):
        bases = tuple(source(base) for base in kind.__bases__)
        body = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        _sources[kind] = types.new_class(kind.__name__, bases, exec_body=lambda new: new.update(body))
    return _sources.get(kind, kind)
