"""Builds CUDA sources for the emulator with the host compiler, and finds the CUDA headers that they need."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra",
         "-Wno-unknown-pragmas", "-Werror"]  # fmt: skip
SANITIZERS = {
    "": [],
    "thread": ["-fsanitize=thread", "-Wno-tsan"],
    "address": ["-fsanitize=address,undefined", "-fsanitize=bounds", "-fno-sanitize-recover=all"],
}
RUNTIME = ("emu_runtime.cpp", "emu_fibre.cpp", "emu_warp.cpp", "emu_memory.cpp", "emu_host.cpp")

# Triton's wheel has NVIDIA's headers without libcu++, of which they need one macro.
TARGET_STUB = """#pragma once
#define NV_IF_ELSE_TARGET(condition, yes, ...) __VA_ARGS__
"""


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("g++")


def toolkit_include() -> Path | None:
    """The include folder of the CUDA toolkit, asked of nvcc itself: the nvcc on PATH may be a wrapper."""
    if nvcc := shutil.which("nvcc"):
        command = [nvcc, "--dryrun", "-E", "any.cu"]
        said = subprocess.run(command, capture_output=True, text=True, env=plain_environment()).stderr
        if top := re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE):
            include = Path(top[1]).resolve() / "include"
            if (include / "cuda_runtime.h").exists():
                return include
    return None


def triton_include() -> Path | None:
    spec = importlib.util.find_spec("triton")
    include = Path(spec.origin).parent / "backends/nvidia/include" if spec and spec.origin else None
    return include if include and (include / "cuda_bf16.h").exists() else None


def include_flags(out: Path) -> list[str]:
    """-I flags for the CUDA headers; FileNotFoundError where there are none."""
    if include := toolkit_include():
        return ["-isystem", str(include), "-isystem", str(include / "cccl")]
    if include := triton_include():
        stub = out / "stub"
        (stub / "nv").mkdir(parents=True, exist_ok=True)
        (stub / "nv/target").write_text(TARGET_STUB)
        return ["-isystem", str(stub), "-isystem", str(include)]
    raise FileNotFoundError("no CUDA headers: neither a CUDA toolkit nor triton's wheel was found")


def plain_environment() -> dict[str, str]:
    """This process's, for programs that no sanitizer watches."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=plain_environment())
    if done.returncode:
        raise RuntimeError(f"{' '.join(str(part) for part in command)}\n{done.stderr}")


def runtime(out: Path) -> list[Path]:
    """The emulator's objects, never with a sanitizer: they switch the stacks that a sanitizer watches."""
    objects = []
    for source in RUNTIME:
        target = out / f"{source}.o"
        if not target.exists():
            run([compiler(), *FLAGS, *include_flags(out), "-I", HERE, "-c", HERE / source, "-o", target])
        objects.append(target)
    return objects


def build(sources: list[Path], out: Path, name: str, sanitizer: str = "", executable: bool = False, extra=()) -> Path:
    """`out/name` from .cu files and the emulator: a shared library, or a program."""
    out.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in sources:
        target = out / f"{name}.{source.name}.o"
        flags = [*FLAGS, *SANITIZERS[sanitizer], *extra, *include_flags(out), "-I", HERE, "-I", CSRC]
        run([compiler(), *flags, "-x", "c++", "-c", source, "-o", target])
        objects.append(target)
    # Its own names first: a torch with CUDA has put the real runtime's before all others.
    kind = [] if executable else ["-shared", "-Wl,-Bsymbolic"]
    run([compiler(), *kind, *SANITIZERS[sanitizer], *objects, *runtime(out), "-o", out / name, "-pthread"])
    return out / name
