"""Makes `fastpeft` importable from a checkout that is not installed, and names the results."""

import datetime
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(os.environ.get("FASTPEFT_BENCH_RESULTS") or ROOT / "bench" / "results")


FOLDERS = {"fastpeft": ROOT / "fastpeft", "emulator": ROOT / "tests" / "emulator"}


class _Finder:
    """Resolves what is not installed to its folder in the checkout.

    ROOT itself on sys.path would let the folder kernels/ pass for the package of that name, which transformers imports.
    """

    mode = "installed"

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in FOLDERS:
            return None
        folder = FOLDERS[name]
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def ensure_importable() -> str:
    """Returns "installed", or "tree": the package of this checkout, with the fastpeft._C that was built in place."""
    if _Finder not in sys.meta_path:
        _Finder.mode = "tree" if importlib.util.find_spec("fastpeft") is None else "installed"
        sys.meta_path.append(_Finder)  # the last: what is installed goes first
    return _Finder.mode


def lacking(device: str) -> str | None:
    """What the CUDA kernels of csrc/ require and do not have here; None where they serve, and on a CPU."""
    if device == "cpu":
        return None
    import torch

    from fastpeft import dispatch

    try:
        return dispatch.unmet("dequantize_4bit", "cuda", "cuda", torch.bfloat16)
    except (AttributeError, RuntimeError) as error:
        return f"an extension of these sources ({str(error)[:120]})"


def stamp(device: str) -> dict:
    """What a result of an earlier run has to share with this one to stand for it."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {"sources": source_hash(), "device": name, "lacking": lacking(device)}


def source_hash() -> str:
    """Hash of every source file, tuned tables left out: tuning must not void the results it was made from."""
    digest = hashlib.sha256()
    for folder in ("fastpeft", "kernels", "csrc", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cpp", ".cu", ".h", ".cuh"} and RESULTS not in path.parents:
                text = re.sub(r"# (tiles|tuned): begin.*?# \1: end", "", path.read_text(), flags=re.DOTALL)
                digest.update(f"{path.relative_to(ROOT)}\0{text}\0".encode())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None without git."""
    try:
        head, dirty = (
            subprocess.run(("git", "-C", str(ROOT), *args), check=True, capture_output=True, text=True).stdout
            for args in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if dirty.strip() else "")


def environment(device: str = "cpu") -> dict:
    """CPU, GPU, versions and date: what a result needs beside it to mean anything."""
    import torch

    info = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "mkldnn_bf16": mkldnn_bf16(),
        "device": device,
        "commit": commit(),
    }
    for name in ("triton", "peft", "bitsandbytes", "transformers", "numpy"):
        info[name] = _version(name)
    if device == "cuda":
        props = torch.cuda.get_device_properties(0)
        info |= {"gpu": props.name, "cc": f"{props.major}.{props.minor}", "sms": props.multi_processor_count,
                 "cuda": torch.version.cuda}  # fmt: skip
    return info


def mkldnn_bf16() -> bool:
    """Whether torch's CPU GEMM has a native bf16 path here; without one it falls back to a loop of a few GFLOP/s."""
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def _version(name: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write_atomic(path: Path, text: str) -> None:
    """Writes under a temporary name and renames, so that a reader or a killed run never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temp.write_text(text)
    os.replace(temp, path)


def save_json(name: str, data: dict) -> Path:
    """bench/results/<name>.json, atomically. Returns the path."""
    path = RESULTS / f"{name}.json"
    write_atomic(path, json.dumps(data, indent=1, default=float) + "\n")
    return path
