"""The command line: ``fastpeft COMMAND ...``, ``python -m fastpeft COMMAND ...``.

A command is a module with a ``main(arguments) -> exit status``, imported when it is asked for. Nothing of fastpeft
imports this folder.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "compare": ("fastpeft.cli.compare:main", "train the methods side by side on one task: table, plots, JSON"),
    "info": ("fastpeft.cli.info:main", "versions and backends of this installation"),
}
"""First argument -> who serves it, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a command line.

    arguments    without the program's name; None: the process's own
    Returns      the exit status
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        module, _, name = COMMANDS[given[0]][0].partition(":")
        return int(getattr(importlib.import_module(module), name)(given[1:]) or 0)
    asked = bool(given) and given[0] in ("-h", "--help")
    print(usage(), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def usage() -> str:
    """What the command line takes."""
    lines = ["usage: fastpeft COMMAND ...   (or python -m fastpeft COMMAND ...)"]
    lines += [f"  {name:28} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(lines)
