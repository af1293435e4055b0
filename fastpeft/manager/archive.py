"""Tensors and their description in one file: written to a temporary name and renamed, read without executing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from fastpeft.files import safe, tensors
from fastpeft.ops import _checks

_FORMAT = "fastpeft"


def write(path: str | os.PathLike[str], held: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write the tensors ``held`` and ``about`` (JSON) into ``path``, which `files.safe` replaces as a whole.

    A path that ends in .pt, .pth or .bin gets torch's archive, which loads with weights_only=True; any other path gets
    safetensors.
    Raises     ImportError: safetensors is needed and not installed.  OSError: as the file system says.
    """
    if Path(path).suffix not in tensors.TORCH:
        tensors.safetensors(_FORMAT)

    def fill(file: Path) -> None:
        plain = tensors.plain(held)
        if Path(path).suffix in tensors.TORCH:
            torch.save({_FORMAT: json.dumps(about), "tensors": plain}, file)
        else:
            tensors.safetensors(_FORMAT).save_file(plain, file, metadata={_FORMAT: json.dumps(about)})

    safe.write_file(path, fill)


def read(op: str, path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `write` wrote; nothing of the file is executed.

    Raises     FileNotFoundError.  ValueError: not our format, or a damaged file.  ImportError: no safetensors.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{op}: path must be a file, got {str(path)!r}")
    if source.suffix not in tensors.TORCH:
        tensors.safetensors(_FORMAT)
    try:
        held, about = _torchs(source) if source.suffix in tensors.TORCH else _safe(source)
    except Exception as error:  # a damaged or foreign file fails in many ways, and each means the same here
        kind = type(error.__cause__ or error).__name__
        raise ValueError(
            f"{op}: path must be a file that save_efficient_weights wrote, got {str(path)!r}: {kind}"
        ) from error
    sound = isinstance(about, dict) and isinstance(held, dict)
    sound = sound and all(isinstance(value, torch.Tensor) for value in held.values())
    _checks.require(sound, op, "path", "be a file that save_efficient_weights wrote", repr(str(path)))
    return held, about


def _torchs(source: Path) -> tuple[Any, Any]:
    archive = torch.load(source, map_location="cpu", weights_only=True)
    return archive["tensors"], json.loads(archive[_FORMAT])


def _safe(source: Path) -> tuple[Any, Any]:
    held, metadata = tensors.read(_FORMAT, source)
    return held, json.loads(metadata[_FORMAT])
