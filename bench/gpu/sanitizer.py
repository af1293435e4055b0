"""compute-sanitizer over the CUDA kernels of csrc/ at small shapes, where the tool exists: memory, races, barriers."""

import os
import shutil
import signal
import subprocess
import sys
import time

from common import tree
from gpu.stage import Stage, die_with_parent

TOOLS = ("memcheck", "racecheck", "synccheck")
# The names of our kernels alone: torch's own would take most of the time. See csrc/.
KERNELS = "kernel_substring=4bit"


def sanitizer() -> str | None:
    """The tool of the toolkit that nvcc is of, or that is on PATH."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def run(stage: Stage) -> dict:
    tool = sanitizer()
    if stage.device != "cuda" or tool is None:
        why = "needs a GPU" if stage.device != "cuda" else "no compute-sanitizer on PATH or in CUDA_HOME"
        stage.row("sanitizer", "all", ok=None, detail=f"left out: {why}")
        stage.say(f"sanitizer: left out, {why}")
        return {"ok": True, "left_out": why}
    target = [sys.executable, str(tree.ROOT / "bench"), "sanitized"]
    running = {}
    for name in TOOLS:  # side by side: each spends its time on the host
        command = [tool, "--tool", name, "--error-exitcode", "9", "--kernel-name", KERNELS, *target]
        running[name] = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    errors = []
    for name, process in running.items():
        started = time.monotonic()
        try:
            text, _ = process.communicate(timeout=max(1.0, stage.left()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            text += "\nout of time"
        lines = [line for line in text.splitlines() if line.strip()] or ["no output"]
        passed = process.returncode == 0
        told = next((line for line in reversed(lines) if "SUMMARY" in line), lines[-1])
        stage.row("sanitizer", name, ok=passed, detail=told[:200], seconds=time.monotonic() - started)
        stage.say(f"{'ok  ' if passed else 'FAIL'} sanitizer {name}: {told[:160]}")
        if not passed:
            errors.append(f"{name}: {told[:160]}")
            for line in lines[-12:]:
                stage.say(f"     {line[:200]}")
    return {"ok": not errors, "errors": errors}
