"""What of this package is installed, what its build left out, and what it hides. Loads no extension."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc"
"""Where a checkout has its sources; an installed package has no such folder."""
BUILD = "pip install --no-build-isolation"


def left_out() -> dict[str, str]:
    """The parts that the build of this package left out, and why; empty if all are there or nothing was built."""
    try:
        record = json.loads((HERE / "_build.json").read_text())
    except FileNotFoundError:
        return {}
    return dict(record["left_out"])


def hidden() -> Path | None:
    """The installed package with an extension that this checkout, which has none, hides; or None."""
    if not SOURCES.is_dir() or any(HERE.glob("_C*")):
        return None
    for found in importlib.metadata.distributions(name="fastpeft"):
        folder = Path(str(found.locate_file("fastpeft")))
        if folder.resolve() != HERE and any(folder.glob("_C*")):
            return folder
    return None


def absent() -> str:
    """Why this package has no extension, and what to do."""
    why = left_out().get("C++ kernels")
    if SOURCES.is_dir():
        other = hidden()
        hides = f"; Python takes it before the package in {other}, as it was started there" if other else ""
        return f"not built in the checkout {HERE.parent}{f', as {why}' if why else ''}{hides}: `{BUILD} -e .` builds it"
    if why:
        return f"left out when this package was built, as {why}: install it anew, with --no-cache-dir --force-reinstall"
    others = ", ".join(sorted(path.name for path in HERE.glob("_C*")))
    return f"for another Python: {HERE} has {others}" if others else f"missing from {HERE}"


def warn_of_hidden() -> None:
    """Warn if a checkout without an extension hides an installed package with one: no later error would say so."""
    if hidden():
        warnings.warn(f"fastpeft: the compiled extension is {absent()}", RuntimeWarning, stacklevel=3)
