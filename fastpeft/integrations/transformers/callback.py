"""`AccelerateCallback` accelerates a Trainer's model once the trainer has it and before the model is wrapped."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

from fastpeft.integrations.peft.accelerate import accelerated
from fastpeft.integrations.peft.report import Report

__all__ = ["AccelerateCallback"]


class AccelerateCallback:
    """A callback for transformers' ``Trainer`` and TRL's trainers: ``callbacks=[fastpeft.AccelerateCallback()]``.

    It accelerates the trainer's model when the trainer is made: TRL has injected the ``peft_config``'s adapter by then,
    and nothing is sharded or wrapped yet. It does so again when training begins, for a model that ``model_init`` has
    remade and adapters that were added in between. Saving, loading and merging stay PEFT's. Except for ``model_init``,
    calling ``fastpeft.accelerate(trainer)`` once the trainer is made does the same.

    report     called with a `Report` each time layers were accelerated, in the first of several processes:
               ``AccelerateCallback(report=print)``
    Warns      when training begins, if no layer of the model can be accelerated, and why
    Raises     ImportError: transformers is not installed
    """

    report: Report | None = None
    """The latest one."""

    def __new__(cls, report: Callable[[Report], Any] | None = None) -> AccelerateCallback:
        return object.__new__(_with_events(cls))  # type: ignore[arg-type]

    def __init__(self, report: Callable[[Report], Any] | None = None) -> None:
        self._told = report

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        self._accelerate(model, state)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        report = self._accelerate(model, state)
        if not report.accelerated and not report.waiting:
            warnings.warn(str(report), stacklevel=2)

    def _accelerate(self, model: Any, state: Any) -> Report:
        report = self.report = accelerated("AccelerateCallback", model, told=self._told is not None)
        if self._told is not None and report.changed and state.is_world_process_zero:
            self._told(report)
        return report

    def __reduce__(self) -> Any:  # the instance's class is made at run time
        return type(self).__mro__[1], (self._told,)


@functools.cache
def _with_events(kind: type) -> type:
    """``kind`` over transformers' own callback class, which has every event that a trainer may call."""
    try:
        base = importlib.import_module("transformers").TrainerCallback
    except ImportError as error:
        raise ImportError(f"{kind.__name__}: transformers must be installed, got {error}") from error
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, base), names)
