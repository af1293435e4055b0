"""The command line: ``fastpeft COMMAND ...``, or a script, ``python -m fastpeft script.py ...``.

A command is a module with a ``main(arguments) -> exit status``, imported on demand; everything else is a script for
`run`. Nothing in fastpeft imports this folder.
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

RUN = "fastpeft.cli.run:main"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a command line.

    arguments    without the program's name; None: the process's own
    Returns      the exit status; a script's own SystemExit passes
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    command = COMMANDS.get(given[0])
    where, rest = (RUN, given) if command is None else (command[0], given[1:])
    module, _, name = where.partition(":")
    return int(getattr(importlib.import_module(module), name)(rest) or 0)


def usage() -> str:
    """The usage text."""
    lines = ["usage: fastpeft COMMAND ...   (or python -m fastpeft COMMAND ...)"]
    lines += [f"  {name:28} {what}" for name, (_, what) in COMMANDS.items()]
    lines += [
        "  [OPTIONS] script.py ARGS      run a script in which every PEFT adapter is accelerated (fastpeft.patch)",
        "  [OPTIONS] -m module ARGS      the same for a module, as python -m does",
        "    --report                    print a report for each adapter as it is injected",
        "    --quiet                     print nothing, not even the summary at the end",
        "`fastpeft COMMAND --help` says more; `torchrun -m fastpeft script.py` and `accelerate launch -m fastpeft",
        "script.py` run it on several processes.",
    ]
    return "\n".join(lines)
