"""The condition of conditional factors: given with a call, or for every call inside ``with task(...)``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fastpeft.ops import _checks

_current: ContextVar[Any] = ContextVar("fastpeft_task", default=None)


@contextmanager
def task(condition: Any) -> Iterator[None]:
    """Give task ids or embeddings to every call inside that has none; this reaches layers deep in a model.

    condition      as the layers take it: ConditionalLoRALinear task ids, HyperLoRALinear task embeddings
    """
    token = _current.set(condition)
    try:
        yield
    finally:
        _current.reset(token)


def given(op: str, name: str, condition: tuple[Any, ...]) -> Any:
    """The one condition of a call.

    Raises     ValueError: none, here or by `task`.  TypeError: several.
    """
    _checks.require_dtype(len(condition) <= 1, op, "arguments", f"be x and {name}", f"{len(condition)} beside x")
    value = condition[0] if condition else _current.get()
    _checks.require(value is not None, op, name, "be given, with the call or by task()", None)
    return value
