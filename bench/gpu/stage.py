"""What a stage of `make gpu` is given, and the file that its rows are appended to."""

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import tree

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)  # not in a child: a fork may hold the loader's lock


def die_with_parent(parent: int = 0) -> None:
    """First thing in a child: a parent that is killed takes it along (Linux), also one that is gone by now."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        os._exit(1)


def rows_path(tiny: bool) -> Path:
    return tree.RESULTS / ("gpu_rows_tiny.jsonl" if tiny else "gpu_rows.jsonl")


def read_rows(path: Path, key: str) -> dict[tuple[str, str], dict]:
    """The last whole row of each (kind, name) of the run `key`; a line that a kill cut short is left out."""
    found: dict[tuple[str, str], dict] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row.get("key") == key:
            found[row["kind"], row["name"]] = row
    return found


@dataclass
class Stage:
    """device: "cuda", or "cpu" for a dry run. until: time.time() at which the stage has to have ended. key: sources and
    device that its rows are of."""

    device: str
    tiny: bool
    until: float
    fresh: bool = False
    key: str = ""
    say: Callable[[str], None] = print

    def left(self) -> float:
        return self.until - time.time()

    def row(self, kind: str, name: str, **values: object) -> None:
        """A measured row: one line of JSON, on disk before the next is measured."""
        path = rows_path(self.tiny)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": self.key, "kind": kind, "name": name, **values}, default=float)
        # A line that a kill cut short is ended by the newline before the next.
        with path.open("a") as file:
            file.write(("" if path.stat().st_size == 0 else "\n") + line)
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> dict[tuple[str, str], dict]:
        return read_rows(rows_path(self.tiny), self.key)
