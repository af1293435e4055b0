"""``python -m fastpeft script.py ...``: the script as Python runs it, with `fastpeft.patch` on.

fastpeft imports torch before the script begins, but neither transformers nor PEFT: environment variables that torch
reads on import must be set outside; those of transformers and PEFT may be set by the script.
"""

from __future__ import annotations

import atexit
import builtins
import os
import pkgutil
import runpy
import sys
import types
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader, SourcelessFileLoader
from typing import Any

import fastpeft

NAME = "python -m fastpeft"
OPTIONS = ("--report", "--quiet", "-m")


def main(arguments: Sequence[str]) -> int:
    """Run a script, a folder or zip file with a ``__main__.py``, or a module (``-m``).

    ``__main__``, ``sys.argv`` and ``sys.path[0]`` are as under ``python script.py`` and ``python -m module``;
    exceptions and exit statuses pass through. When the process ends, a summary goes to stderr; of several processes,
    only the first (``RANK``) prints one.
    """
    options, target, rest = _parse(list(arguments))
    module = "-m" in options
    if not module and not os.path.exists(target):
        sys.exit(f"{NAME}: script must be a file, got {target!r}; `{NAME} --help` lists the commands")
    first = os.environ.get("RANK", "0") == "0"
    patched = fastpeft.patch(report=_say if "--report" in options and first else None)
    if "--quiet" not in options and first:
        atexit.register(lambda: _say(patched))
    # A fresh module, so that none of our names are among the script's globals. It stays `__main__` to the end of the
    # process, since exit handlers, threads and pickle still look names up there.
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    vars(main).update(__builtins__=builtins, **({"__annotations__": {}} if sys.version_info < (3, 14) else {}))
    if module:
        _search(os.getcwd())
        sys.argv = ["-m", *rest]  # until the module is found; then the path of its file
        runpy._run_module_as_main(target)  # type: ignore[attr-defined]  # what `python -m` calls
    elif pkgutil.get_importer(target) is not None:
        _search(os.path.abspath(target))
        sys.argv = [target, *rest]
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
    else:
        _search(os.path.dirname(os.path.realpath(target)))
        sys.argv = [target, *rest]
        _run_file(os.path.join(os.getcwd(), target), main)  # not normalised, like CPython
    return 0


def _parse(arguments: list[str]) -> tuple[set[str], str, list[str]]:
    """(our options, the script or the module, its own arguments)"""
    options: set[str] = set()
    while arguments and arguments[0].startswith("-") and "-m" not in options:
        option = arguments.pop(0)
        if option not in OPTIONS:
            sys.exit(f"{NAME}: an option before the script must be one of {', '.join(OPTIONS)}, got {option!r}")
        options.add(option)
    if not arguments:
        sys.exit(f"{NAME}: a script must be given, got none; `{NAME} --help` lists the commands")
    return options, arguments[0], arguments[1:]


def _say(what: Any) -> None:
    print(what, file=sys.stderr, flush=True)


def _search(folder: str) -> None:
    """Set the first entry of the search path, which Python chose when `fastpeft` itself was started."""
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = folder


def _run_file(path: str, main: types.ModuleType) -> None:
    if path.endswith(".pyc"):
        loader: Any = SourcelessFileLoader("__main__", path)
        code = loader.get_code("__main__")
    else:
        loader = SourceFileLoader("__main__", path)
        code = loader.source_to_code(loader.get_data(path), path)  # get_code would leave a file in __pycache__
    vars(main).update(__file__=path, __loader__=loader, __cached__=None)
    exec(code, vars(main))
