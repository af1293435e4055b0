"""Tensors and what is said about them in one file: written aside and renamed, read without executing anything."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastpeft.ops import _checks

_TORCH = (".pt", ".pth", ".bin")
_FORMAT = "fastpeft"


def write(path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """``tensors`` and ``about`` (JSON) into ``path``.

    A path that ends in .pt, .pth or .bin gets torch's archive, which loads with weights_only=True; any other one
    safetensors. The file is written beside, flushed, and renamed: a crash at any moment leaves the old one whole.
    Raises     ImportError: safetensors is needed and not installed.  OSError: as the file system says.
    """
    target = Path(path)
    # Copies: views of one storage are refused by safetensors, and written whole by torch.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    os.close(handle)
    try:
        if target.suffix in _TORCH:
            torch.save({_FORMAT: json.dumps(about), "tensors": plain}, name)
        else:
            _safetensors().save_file(plain, name, metadata={_FORMAT: json.dumps(about)})
        os.chmod(name, _permissions(target))
        with open(name, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


def _permissions(target: Path) -> int:
    """Those of the file that is replaced, or of any new file: a temporary one is for its owner alone."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _flush_folder(folder: Path) -> None:
    """The new name too; some systems cannot open a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(op: str, path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `write` wrote; nothing of the file is executed.

    Raises     FileNotFoundError.  ValueError: no file of ours, or a damaged one.  ImportError: no safetensors.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{op}: path must be a file, got {str(path)!r}")
    if source.suffix not in _TORCH:
        _safetensors()
    try:
        tensors, about = _torchs(source) if source.suffix in _TORCH else _safe(source)
    except Exception as error:  # a damaged or foreign file fails in many ways, and each means the same here
        raise ValueError(f"{op}: path must be a file that save_efficient_weights wrote, got {str(path)!r}: "
                         f"{type(error).__name__}") from error  # fmt: skip
    sound = isinstance(about, dict) and isinstance(tensors, dict)
    sound = sound and all(isinstance(value, torch.Tensor) for value in tensors.values())
    _checks.require(sound, op, "path", "be a file that save_efficient_weights wrote", repr(str(path)))
    return tensors, about


def _torchs(source: Path) -> tuple[Any, Any]:
    archive = torch.load(source, map_location="cpu", weights_only=True)
    return archive["tensors"], json.loads(archive[_FORMAT])


def _safe(source: Path) -> tuple[Any, Any]:
    _safetensors()
    with importlib.import_module("safetensors").safe_open(str(source), framework="pt") as archive:
        about = json.loads((archive.metadata() or {})[_FORMAT])
        return {name: archive.get_tensor(name) for name in archive.keys()}, about  # noqa: SIM118


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        wanted = "safetensors must be installed (pip install fastpeft[files]), or the path end in .pt"
        raise ImportError(f"fastpeft: {wanted}") from error
