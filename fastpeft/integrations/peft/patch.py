"""``patch``: accelerate every adapter that PEFT injects from now on, for users who do not hold the model.

PEFT puts each adapter into a model by one method, ``BaseTuner.inject_adapter``: `get_peft_model`, files, later
adapters, transformers, TRL and diffusers all call it. ``patch`` replaces that method by one that calls it and then
`accelerate`; nothing else of PEFT changes. If PEFT is not imported yet, an import hook waits for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from fastpeft.integrations.peft.accelerate import accelerated
from fastpeft.integrations.peft.report import Report

__all__ = ["Patch", "patch", "unpatch"]

_MODULE, _CLASS, _METHOD = "peft.tuners.tuners_utils", "BaseTuner", "inject_adapter"

_lock = threading.RLock()
_patches: list[Patch] = []
"""The patches in force, in the order of their calls."""
_hold: list[_Replaced | _Awaited] = []
"""Our replacement of PEFT's method, or the finder that waits for its module; empty if nothing is patched."""


class Patch:
    """One call of `patch`, in force at once until `unpatch`, or until the end of its ``with`` block."""

    def __init__(self, report: Callable[[Report], Any] | None) -> None:
        self._report = report
        self._block = False
        self.reports: deque[Report] = deque(maxlen=64)
        """What each injection gave, the last 64 of them."""
        self.injected = 0
        """Adapters that have been injected."""
        self.changed = 0
        """Layers whose class has been changed."""
        self.left: Counter[str] = Counter()
        """Why layers were left to PEFT, for now or for good -> how many; one for each injection that found it."""

    @property
    def active(self) -> bool:
        """Whether it is still in force."""
        return any(each is self for each in _patches)

    def __enter__(self) -> Patch:
        self._block = True
        return self

    def __exit__(self, *raised: object) -> None:
        _end(self)

    def __str__(self) -> str:
        lines = [f"fastpeft: adapters injected: {self.injected}, layers accelerated: {self.changed}"]
        return "\n".join([*lines, *(f"  {count:5d}  left to PEFT: {why}" for why, count in self.left.most_common())])

    def _take(self, report: Report) -> None:
        self.injected += 1
        self.changed += report.changed
        self.left.update(report.skipped.values())
        self.reports.append(report)
        if self._report is not None:
            self._report(report)


def patch(report: Callable[[Report], Any] | None = None) -> Patch:
    """From now on, in every thread, `accelerate` each model into which PEFT injects an adapter.

    Reached: ``get_peft_model``, ``PeftModel.from_pretrained``, ``add_adapter`` and ``load_adapter`` of PEFT's and of
    transformers' models, ``inject_adapter_in_model``, TRL's ``peft_config``, diffusers' ``load_lora_weights``. PEFT
    need not be imported yet, and is not imported here. Models that already have their adapters are left alone.

    report     called with the `Report` of each injection: ``patch(report=print)``
    Returns    a `Patch`: a context manager that ends with its block (``with fastpeft.patch(): ...``); it keeps the
               reports. Several may be in force at once; a model is still accelerated once
    Warns      if PEFT is not installed; if no layer of an injection can be accelerated, and why; and about an error of
               ours, after which the injection stands, in PEFT's own classes
    """
    made = Patch(report)
    if importlib.util.find_spec("peft") is None:
        warnings.warn("patch: peft must be installed for adapters to be injected, got no such package", stacklevel=2)
    with _lock:
        _patches.append(made)
        if not _hold:
            finder = _Awaited()
            _hold.append(finder)
            sys.meta_path.insert(0, finder)
    if _MODULE in sys.modules:
        importlib.import_module(_MODULE)  # another thread may be in the middle of importing it
        _arrived()
    return made


def unpatch() -> int:
    """End every `patch` that is not a ``with`` block's; after the last one PEFT has its own method again.

    Models that were accelerated stay accelerated: use `restore`.

    Returns    how many were ended
    """
    with _lock:
        ended = [each for each in _patches if not each._block]
        for each in ended:
            _end(each)
    return len(ended)


def _end(patch: Patch) -> None:
    with _lock:
        _patches[:] = [each for each in _patches if each is not patch]
        if not _patches and _hold:
            _hold.pop().undo()


def _arrived() -> None:
    """PEFT's module is now imported: replace its method, if that is still wanted."""
    with _lock:
        if _hold and isinstance(_hold[0], _Awaited):
            owner = getattr(sys.modules[_MODULE], _CLASS, None)
            if not callable(getattr(owner, _METHOD, None)):
                version = getattr(sys.modules.get("peft"), "__version__", "unknown")
                warnings.warn(f"patch: peft must have {_CLASS}.{_METHOD}, got none in version {version}", stacklevel=3)
                return
            _hold.pop().undo()
            _hold.append(_Replaced(owner))


def _injected(model: Any) -> None:
    """Run after an injection; only the user's own ``report`` can raise."""
    try:
        report = accelerated("patch", model, told=any(each._report is not None for each in _patches))
    except Exception as error:
        report = Report(note=f"{type(error).__name__}: {error}")
        warnings.warn(f"patch: the adapter is PEFT's own, after an error: {report.note}", RuntimeWarning, stacklevel=4)
    else:
        if report.skipped and not report.accelerated and not report.waiting:
            warnings.warn(str(report), stacklevel=4)
    for each in tuple(_patches):
        each._take(report)


class _Replaced:
    """PEFT's method, replaced. If others have replaced it since, it cannot be put back; ours then only calls PEFT's."""

    def __init__(self, owner: Any) -> None:
        original = vars(owner)[_METHOD]

        @functools.wraps(original)
        def inject_adapter(tuner: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            given = original(tuner, model, *args, **kwargs)
            if self._live:
                _injected(model)
            return given

        self._owner, self._original, self._ours, self._live = owner, original, inject_adapter, True
        setattr(owner, _METHOD, inject_adapter)

    def undo(self) -> None:
        self._live = False
        if vars(self._owner).get(_METHOD) is self._ours:
            setattr(self._owner, _METHOD, self._original)


class _Awaited:
    """A finder that notices the import of PEFT's module and lets the other finders find it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _MODULE:
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)  # Python 3.11 permits finders without
            spec: Any = None if find is None else find(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None

    def undo(self) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]


class _Loader:
    """Wraps the module's own loader and calls us once it has loaded; the module keeps its own loader."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def create_module(self, spec: Any) -> Any:
        return self._own.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._own
        self._own.exec_module(module)
        _arrived()
