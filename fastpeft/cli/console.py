"""A command's output, its progress bar, and the machine behind its figures. Needs rich."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def console() -> Console:
    """Standard output; at least 100 columns if it is a file, so that no table is cut off in a log."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=max(100, out.width))


def progress(out: Console) -> Progress:
    """A bar with counts, times and a free text (`extra`) at its end."""
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[extra]}"),
        console=out,
    )


def machine(device: torch.device) -> dict[str, str | int]:
    """The machine and versions with which the figures were taken."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {processor()}",
        "cpu_threads": torch.get_num_threads(),
        "cpu_cores": os.cpu_count() or 0,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's own name, if the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
