"""``fastpeft compare``: the methods side by side on one task; the function of a custom task returns a `Task`."""

from fastpeft.cli.compare.command import main
from fastpeft.cli.compare.task import Task

__all__ = ["Task", "main"]
