"""The file of a comparison: the settings, every run as soon as it is done, the costs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpeft.ops import _checks

FORMAT = 1


def point_key(name: str, options: Mapping[str, Any]) -> str:
    """A method and its options that differ from the defaults: ``lora rank=4 lr=0.001``."""
    return " ".join([name, *(f"{option}={_short(value)}" for option, value in options.items())])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_key(point: str, seed: int) -> str:
    return f"{point} | seed {seed}"


class Record:
    """One JSON file, atomically rewritten after every run. A kill at any moment costs one run.

    settings   everything that a result depends on besides method, options and seed
    Raises     ValueError: an existing file has other settings, or is not a comparison.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file = file
        self.data: dict[str, Any] = {"format": FORMAT, "settings": settings, "machines": [], "runs": {}, "costs": {}}
        if file.exists():
            self._resume(settings)

    @classmethod
    def found(cls, file: Path) -> Record:
        """The comparison in a file, whatever its settings. Raises ValueError, OSError: there is none."""
        return cls(file, read(file)["settings"])

    def _resume(self, settings: dict[str, Any]) -> None:
        found = read(self.file)
        there = found["settings"]
        changed = [name for name in sorted({*there, *settings}) if there.get(name) != settings.get(name)]
        told = "; ".join(f"{name} {there.get(name)!r} there, {settings.get(name)!r} now" for name in changed)
        rule = f"be a folder whose {self.file.name} was made with these options (or name another one)"
        _checks.require(not changed, "compare", "--out", rule, told)
        self.data = found

    def done(self, key: str) -> bool:
        """Whether this run succeeded; one that failed is tried again."""
        return "metric" in self.data["runs"].get(key, {})

    def points(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """{key: (method, options)} of every run that succeeded."""
        runs = {key.rpartition(" | ")[0]: run for key, run in self.data["runs"].items() if self.done(key)}
        return {key: (run["method"], run["options"]) for key, run in runs.items()}

    def seeds(self) -> list[int]:
        return sorted({run["seed"] for run in self.data["runs"].values()})

    def add(self, key: str, run: dict[str, Any]) -> None:
        self.data["runs"][key] = run
        self.write()

    def on(self, machine: dict[str, Any]) -> None:
        """Record a machine on which something was run."""
        if machine not in self.data["machines"]:
            self.data["machines"].append(machine)

    def write(self) -> None:
        """Write one line per run, so that a diff shows what is new."""
        head = {name: value for name, value in self.data.items() if name != "runs"}
        runs = ",\n".join(f"  {json.dumps(key)}: {json.dumps(run)}" for key, run in self.data["runs"].items())
        lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        write(self.file, "{\n" + ",\n".join([*lines, f' "runs": {{\n{runs}\n }}']) + "\n}\n")


def read(file: Path) -> dict[str, Any]:
    """Read a comparison's file. Raises ValueError: it is another kind of file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"compare: --out must hold a comparison's {file.name}, got no JSON: {error}") from error
    sound = isinstance(found, dict) and found.get("format") == FORMAT and {"settings", "runs", "costs"} <= found.keys()
    rule = f"hold a comparison's {file.name} of format {FORMAT}"
    _checks.require(sound, "compare", "--out", rule, "another file of that name")
    assert isinstance(found, dict)
    return found


def write(file: Path, text: str) -> None:
    """Replace ``file`` by ``text`` atomically: a reader, even after a kill, finds the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as part:
            part.write(text)
            part.flush()
            os.fsync(part.fileno())
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
