"""Tensors in one file or several: safetensors or torch's archive, read without executing anything."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from fastpeft.ops import _checks

TORCH = (".pt", ".pth", ".bin")
SAFE = ".safetensors"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# A config or an index is some kilobytes; the limit keeps us from reading gigabytes of JSON by mistake.
_LONGEST_JSON = 2**26


def safetensors(op: str) -> Any:
    """The module ``safetensors.torch``.

    Raises     ImportError: it is not installed.
    """
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        wanted = "safetensors must be installed (pip install fastpeft[files]), or the path end in .pt"
        raise ImportError(f"{op}: {wanted}") from error


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU: safetensors refuses views of one storage, and torch writes the whole storage."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def write(op: str, file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` into ``file``; its suffix selects torch's archive of a plain dict, or safetensors.

    metadata   strings of the header; only safetensors has one
    """
    if file.suffix in TORCH:
        torch.save(plain(tensors), file)
    else:
        safetensors(op).save_file(plain(tensors), file, metadata={"format": "pt", **(metadata or {})})


def read(op: str, file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of ``file``, on the CPU, and the strings of its header; nothing in the file is executed.

    Raises     FileNotFoundError.  ValueError: damaged, or no tensors by name.  ImportError: no safetensors.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{op}: path must be a file, got {str(file)!r}")
    if file.suffix not in TORCH:
        safetensors(op)
    metadata: dict[str, str] = {}
    try:
        if file.suffix in TORCH:
            found = torch.load(file, map_location="cpu", weights_only=True)
        else:
            with importlib.import_module("safetensors").safe_open(str(file), framework="pt") as archive:
                metadata = dict(archive.metadata() or {})
                found = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged or foreign file fails in many ways, and each means the same here
        kind = "torch's archive of tensors alone" if file.suffix in TORCH else "a whole safetensors file"
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(f"{op}: {file} must be {kind}, got {text}") from error
    named = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    )
    _checks.require(named, op, str(file), "hold tensors by their names and nothing else", type(found).__name__)
    return {name: value.detach() for name, value in found.items()}, metadata


def size_in_bytes(op: str, size: int | str | None) -> int | None:
    """Bytes of "200MB" or the like; kilo is 1000, kibi 1024."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    known = match is not None and match[2].upper() in _UNITS and not isinstance(size, bool)
    _checks.require(known, op, "max_shard_size", "be bytes, or a size like '200MB'", repr(size))
    assert match is not None
    count = int(float(match[1]) * _UNITS[match[2].upper()])
    _checks.require(count > 0, op, "max_shard_size", "be positive", repr(size))
    return count


def shards(tensors: dict[str, torch.Tensor], most: int | None) -> list[dict[str, torch.Tensor]]:
    """The tensors in their order, in parts of at most ``most`` bytes; a larger tensor is a part of its own."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if most is not None and parts[-1] and held + size > most:
            parts.append({})
            held = 0
        parts[-1][name] = tensor
        held += size
    return parts


def write_sharded(
    op: str, folder: Path, stem: str, tensors: dict[str, torch.Tensor], most: int | None, metadata: dict[str, str]
) -> None:
    """Write ``{stem}.safetensors``, or ``{stem}-00001-of-0000n.safetensors`` and an index of tensor to file."""
    parts = shards(tensors, most)
    if len(parts) == 1:
        write(op, folder / f"{stem}{SAFE}", tensors, metadata)
        return
    names = [f"{stem}-{i:05d}-of-{len(parts):05d}{SAFE}" for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        write(op, folder / name, part, metadata)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
    (folder / f"{stem}{SAFE}.index.json").write_text(text)


def read_sharded(op: str, folder: Path, stem: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, {name: the file that held it}) of ``{stem}`` in ``folder``: one file, shards, or torch's archive.

    Raises     FileNotFoundError: no such file.  ValueError: damaged, or an index that contradicts the shards.
    """
    index = folder / f"{stem}{SAFE}.index.json"
    for file in (folder / f"{stem}{SAFE}", folder / f"{stem}.bin"):
        if file.is_file():
            tensors, _ = read(op, file)
            return tensors, dict.fromkeys(tensors, file.name)
        if file.suffix == SAFE and index.is_file():
            return _read_index(op, folder, index)
    raise FileNotFoundError(f"{op}: path must hold {stem}{SAFE}, its shards or {stem}.bin, got {str(folder)!r}")


def _read_index(op: str, folder: Path, index: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    where = read_json(op, index).get("weight_map")
    sound = isinstance(where, dict) and bool(where) and all(isinstance(file, str) for file in where.values())
    _checks.require(sound, op, str(index), "have a weight_map of names to files", type(where).__name__)
    assert isinstance(where, dict)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(where.values())):
        own = Path(file).name == file and file.endswith(SAFE)
        _checks.require(own, op, str(index), "name safetensors files of its own folder", repr(file))
        part, _ = read(op, folder / file)
        mine = {key for key, name in where.items() if name == file}
        rule = "hold the tensors that the index has there"
        _checks.require(part.keys() == mine, op, str(folder / file), rule, sorted(part.keys() ^ mine)[:3])
        tensors |= part
    return tensors, where


def read_json(op: str, file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises     FileNotFoundError.  ValueError: something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{op}: path must hold {file.name}, got {str(file.parent)!r}")
    small = file.stat().st_size <= _LONGEST_JSON
    _checks.require(small, op, str(file), f"be of {_LONGEST_JSON} bytes at most", file.stat().st_size)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{op}: {file} must be JSON, got {type(error).__name__}: {error}") from error
    _checks.require(isinstance(found, dict), op, str(file), "be a JSON object", type(found).__name__)
    assert isinstance(found, dict)
    return found
