"""A class before a module's own, given in place: built once at run time, under the name of the one that was there.

Nothing else of the module changes, so that parameters, buffers, keys, attributes, saved files and ``isinstance`` stay.
"""

from __future__ import annotations

import copy
import copyreg
import types
from typing import Any


class InPlace:
    """A class given in place: copies keep it, pickles name the class before it; adds nothing to the instance."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the class that was there: what reads the pickle needs no fastpeft."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        # copyreg.__newobj__, the usual function here, lets pickle insist on the object's own class.
        make = copyreg._reconstructor  # type: ignore[attr-defined]
        return make, (source(type(self)), object, None), *reduced[2:]

    def __copy__(self: Any) -> Any:
        """torch's own shallow copy, which ``__reduce_ex__`` would otherwise turn into the class that was there."""
        twin = self.__class__.__new__(self.__class__)
        twin.__setstate__(self.__getstate__())
        self._copied_to(twin)
        return twin

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        """torch's own deep copy, which ``__reduce_ex__`` would otherwise turn into the class that was there."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        self._copied_to(twin)
        return twin

    def _copied_to(self, twin: Any) -> None:
        """Called with each copy that has been made."""

    @classmethod
    def _given_before(cls, kind: type) -> None:
        """Called once with the class that this one, just built, has been put before."""


_built: dict[tuple[type, type], type] = {}
_sources: dict[type, type] = {}


def built(mixin: type[InPlace], kind: type) -> type:
    """The class of ``mixin`` before ``kind``, the same one at every call, under the name that ``kind`` has."""
    key = (mixin, kind)
    if key not in _built:
        # repr, error messages and logs of the library and of its users print these.
        names = {name: vars(kind)[name] for name in ("__module__", "__qualname__", "__doc__") if name in vars(kind)}
        if hasattr(kind, "__deepcopy__"):
            names["__deepcopy__"] = kind.__deepcopy__  # FSDP2 forbids it
        made: Any = types.new_class(kind.__name__, (mixin, kind), exec_body=lambda body: body.update(names))
        made._given_before(kind)
        _built[key], _sources[made] = made, kind
    return _built[key]


def source(kind: type) -> type:
    """The class without ours: what ``built`` was given, also inside a class made on top since (FSDP2)."""
    if kind not in _sources and issubclass(kind, InPlace):
        bases = tuple(source(base) for base in kind.__bases__)
        body = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        _sources[kind] = types.new_class(kind.__name__, bases, exec_body=lambda new: new.update(body))
    return _sources.get(kind, kind)
