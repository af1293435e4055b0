"""Builds fastpeft._C in place, where this interpreter lacks it or csrc/ is newer, for `make gpu` to have CUDA kernels.

Nothing is downloaded: the torch, pybind11 and ninja of this interpreter serve. For this machine's GPU alone, which is
a sixth of nvcc's work; TORCH_CUDA_ARCH_LIST names others.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from common import tree

COMMAND = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
LIMIT = 150  # seconds; 150 s of one core, of which the longest file takes about 25


def lacking() -> str | None:
    """As `tree.lacking`, in a process of its own: what it imports cannot be built again under a running one."""
    code = "from common import tree; print(tree.lacking('cuda') or '')"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip() or "a process that ends well").splitlines()[-1][:160]
    return done.stdout.strip() or None


def _stale(library: Path) -> bool:
    """Whether a library that was built in place is older than what it was built from."""
    sources = [
        tree.ROOT / "setup.py",
        tree.ROOT / "setup_commands.py",
        *filter(Path.is_file, (tree.ROOT / "csrc").rglob("*")),
    ]
    return library.exists() and library.stat().st_mtime < max(path.stat().st_mtime for path in sources)


def build(capability: tuple[int, int], limit_s: float = LIMIT, say: Callable[[str], None] = print) -> str | None:
    """Builds where that is needed and possible, and says what it does; what is still lacking for the CUDA kernels."""
    library = tree.ROOT / "fastpeft" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    missing = lacking()
    if missing is None and not _stale(library):
        return None
    why = missing or f"{library.name} is older than csrc/"
    home = os.environ.get("CUDA_HOME")
    if shutil.which("nvcc", path=f"{home}/bin" if home else None) is None:
        say(f"== build: none, as there is no nvcc; {why}")
        return missing
    major, minor = capability
    arch = os.environ.get("TORCH_CUDA_ARCH_LIST") or f"{major}.{minor}{'a' if major == 9 else ''}"
    say(f"== build: {library.name} with CUDA kernels for {arch}, at most {limit_s:.0f} s; {why}")
    started = time.monotonic()
    env = os.environ | {"FASTPEFT_CPP": "1", "FASTPEFT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}
    process = subprocess.Popen(COMMAND, cwd=tree.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)  # fmt: skip
    try:
        text, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with its compilers
        text, _ = process.communicate()
        text += f"\nbuild: out of time after {limit_s:.0f} s; another run takes it up"
    if process.returncode:
        lines = text.strip().splitlines() or ["it said nothing"]
        said = [line for line in lines if re.search(r"\berror\b|fastpeft: ", line)] or lines[-5:]
        say("\n".join(line[:300] for line in said[:20]))
        return f"a build that succeeds ({lines[-1][:160]})"
    say(f"== build: done in {time.monotonic() - started:.0f} s")
    return lacking()
