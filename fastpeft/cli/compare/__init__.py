"""``fastpeft compare``: the methods side by side on one task; `Task` is what a task of one's own returns."""

from fastpeft.cli.compare.command import main
from fastpeft.cli.compare.task import Task

__all__ = ["Task", "main"]
