"""How many calls each accelerated layer has served or left to PEFT, and why: kept beside the layers, not on them.

A copy of a layer counts from zero; a deleted layer's counts go with it. Counting is one step of the interpreter, safe
in any thread. A graph of torch.compile runs none of this: its calls are counted once, when they are traced.
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Counter:
    """Counts in any thread without a lock; only a reader needs one."""

    __slots__ = ("_read", "add")

    def __init__(self) -> None:
        self.add = itertools.count().__next__  # one step; += is two, and another thread may run between them
        self._read = 0

    def value(self) -> int:
        found = self.add() - self._read
        self._read += 1
        return found


class Calls:
    """The counts of one layer, its name in the model that was accelerated, and the reasons that its user knows."""

    __slots__ = ("alive", "left", "name", "served", "told")

    def __init__(self, name: str, told: set[str], alive: Any) -> None:
        self.name, self.told, self.alive = name, told, alive
        self.served = Counter()
        self.left: dict[str, Counter] = {}


RECORDS: dict[int, Calls] = {}
"""id of a living layer -> its counts: the cheapest look-up, and invisible to deepcopy and pickle."""

GRAPHS = {True: Counter(), False: Counter()}
"""How often torch.compile has traced a call that one of our operators served (True) or did not serve (False)."""

_lock = threading.RLock()  # reentrant, as a warning may run any code
_told: set[str] = set()


def open_record(layer: Any, name: str = "", told: set[str] | None = None) -> Calls:
    """The record of the layer, made if there is none; all layers of one `accelerate` call share ``told``."""
    key = id(layer)
    with _lock:
        record = RECORDS.get(key)
        if record is None:
            alive = weakref.ref(layer, lambda _: RECORDS.pop(key, None))
            record = RECORDS[key] = Calls(name, _told if told is None else told, alive)
        elif told is not None:
            told |= record.told
            record.name, record.told = name, told
    return record


@contextmanager
def uncounted() -> Iterator[None]:
    """Calls inside do not count."""
    with _lock:
        before = [(record, record.served, record.left) for record in RECORDS.values()]
        for record, _, _ in before:
            record.served, record.left = Counter(), {}
    try:
        yield
    finally:
        with _lock:
            for record, served, left in before:
                record.served, record.left = served, left


def copied(layer: Any, twin: Any) -> None:
    """Share with a copy the reasons that the user of ``layer`` has already been told."""
    record = RECORDS.get(id(layer))
    if record is not None:
        open_record(twin, record.name, record.told)


def left(layer: Any, why: str) -> None:
    """Count a call that goes to PEFT's forward, and warn of a reason that is new to the model."""
    record = RECORDS.get(id(layer)) or open_record(layer)
    counter = record.left.get(why)
    if counter is None:
        with _lock:
            counter = record.left.setdefault(why, Counter())
            new = why not in record.told
            record.told.add(why)
        if new:
            where = f"{record.name}: " if record.name else ""
            warnings.warn(
                f"fastpeft: {where}a call was left to PEFT's own forward: {why} (said once; fastpeft.status(model) "
                "counts such calls)",
                stacklevel=2,
            )
    counter.add()


def traced(served: bool) -> None:
    """Count a call that torch.compile traces; Dynamo takes the result as a constant and so runs this untraced."""
    GRAPHS[served].add()


# What torch.compiler.assume_constant_result sets; calling it would import all of Dynamo.
traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def count(layer: Any) -> tuple[int, dict[str, int]]:
    """(calls served, reason -> calls left) of a layer."""
    with _lock:
        record = RECORDS.get(id(layer))
        if record is None:
            return 0, {}
        return record.served.value(), {why: counter.value() for why, counter in record.left.items()}


def graphs() -> tuple[int, int]:
    """(calls traced as ours, as PEFT's) by torch.compile in this process."""
    with _lock:
        return GRAPHS[True].value(), GRAPHS[False].value()


def forget(layer: Any) -> None:
    RECORDS.pop(id(layer), None)
