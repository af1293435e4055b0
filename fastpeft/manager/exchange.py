"""save_adapter and load_adapter: adapters in the formats of other libraries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft.files import kohya, loralib, peft, peft_config, safe, tensors
from fastpeft.files.bundle import Bundle
from fastpeft.manager import targets
from fastpeft.manager.incoming import put
from fastpeft.manager.manager import EfficientFineTuningManager
from fastpeft.manager.outgoing import DEFAULT, bundle_of, manager_of
from fastpeft.nn.config import flag, number, refuse_unknown
from fastpeft.ops import _checks

FORMATS = ("peft", "kohya", "loralib")
_SAVE = {
    "peft": ("base_model", "task_type", "modules_to_save"),
    "kohya": ("prefix", "tucker"),
    "loralib": ("alpha", "modules_to_save"),
}
_LOAD = {"peft": (), "kohya": ("prefix",), "loralib": ("alpha", "enable_lora")}


def save_adapter(
    source: EfficientFineTuningManager | nn.Module,
    path: str | os.PathLike[str],
    format: str = "peft",
    adapter: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    **options: Any,
) -> None:
    """Save one adapter of a model in another library's format; docs/files.md says what converts.

    source     a manager; or a model with adapted layers, or with an inserted prompt or prefix
    path       "peft": a folder, made or replaced as a whole; its other files are kept. "kohya": a .safetensors file.
               "loralib": a .pt file
    adapter    its name; None: the only one
    dtype      of the float tensors; None: as they are
    max_shard_size    of PEFT's weights, bytes or "200MB"; larger ones become several files and an index, which
               fastpeft reads, and PEFT does not
    options    "peft": base_model (a name or folder), task_type; both from the model if not given · "kohya": prefix
               ("lycoris"; sd-scripts expects lora_unet, lora_te1, …), tucker (False; True writes lora_mid) ·
               "loralib": alpha, the lora_alpha of the layers that will read it · "peft" and "loralib": modules_to_save,
               names of modules to write whole, in addition to those that the manager trains whole
    A merged adapter is written in its unmerged form. Masks and gains of sparse, pruned and AdaLoRA adapters (except
    form "svd") are written into A.
    Everything is checked before anything is written, and a crash at any moment leaves the old file, or folder, whole.
    Raises     ValueError: an adapter that the format cannot store, a value that is not finite, an argument.
               TypeError.  ImportError: no safetensors.  OSError.
    """
    op = "save_adapter"
    _checks.one_of(op, "format", format, FORMATS)
    refuse_unknown(op, options, _SAVE[format])
    most = tensors.size_in_bytes(op, max_shard_size)
    _checks.require(
        most is None or format == "peft", op, "max_shard_size", "be None for a format of one file", max_shard_size
    )
    manager = manager_of(op, source)
    whole = manager._named_modules(op, options.get("modules_to_save")) | manager.saved_modules
    bundle = bundle_of(op, manager, adapter, whole)
    bundle.cast(op, dtype)
    if format == "peft":
        model = targets.walk(manager.model)
        tensors.safetensors(op)
        safe.write_folder(op, path, lambda folder: peft.write(op, folder, bundle, model, most, options), peft.owned)
        return
    suffixes = tensors.TORCH if format == "loralib" else (tensors.SAFE,)
    _checks.require(Path(path).suffix in suffixes, op, "path", f"end in {' or '.join(suffixes)}", repr(str(path)))
    if format == "kohya":
        prefix, tucker = options.get("prefix", "lycoris"), options.get("tucker", False)
        flag(op, "tucker", tucker)
        sound = isinstance(prefix, str) and prefix != "" and "." not in prefix
        _checks.require(sound, op, "prefix", "be a name without dots", repr(prefix))
        safe.write_file(path, lambda file: kohya.write(op, file, bundle, prefix, tucker))
    else:
        safe.write_file(path, lambda file: loralib.write(op, file, bundle, _alpha(op, options)))


def load_adapter(
    target: EfficientFineTuningManager | nn.Module,
    path: str | os.PathLike[str],
    adapter: str | None = None,
    *,
    format: str | None = None,
    method: str | None = None,
    **options: Any,
) -> EfficientFineTuningManager:
    """Load an adapter that another library, or ``save_adapter``, saved into a model; returns the model's manager.

    target     a model, or the manager of a model with adapters, to which a new adapter is added
    path       PEFT's folder; a kohya or LyCORIS file; a loralib state dict
    adapter    the name of the new adapter; an existing adapter of that name, or a manager's only one, takes the values
               instead. None: "default" in a model without adapters
    format     "peft", "kohya" or "loralib"; None: detected from the path
    method     "qlora" quantises the layers of a LoRA file first; None: as the file says
    options    "kohya": prefix, for a file with several models · "loralib": alpha, the lora_alpha of its layers (1), and
               enable_lora of its MergedLinear · options of the adapter's class that the file does not give:
               adapter_dtype, dropout, quant_type, …
    The model is frozen, and the adapter trained, as by the manager's ``apply_…``.
    Raises     FileNotFoundError.  ValueError, TypeError: a damaged or foreign file, an unknown method or option, a
               missing or unknown tensor, a shape that does not fit the model, a value that is not finite: the text
               names file, key, rule and value, and nothing has been changed.  ImportError: no safetensors.
    """
    op = "load_adapter"
    _checks.one_of(op, "format", format, (None, *FORMATS))
    manager = manager_of(op, target)
    _checks.require_dtype(
        adapter is None or isinstance(adapter, str), op, "adapter", "be a name", type(adapter).__name__
    )
    known = sorted(manager.methods)
    _checks.require(adapter is not None or len(known) <= 1, op, "adapter", f"be given beside {known}", None)
    name = adapter if adapter is not None else (known or [DEFAULT])[0]
    modules = targets.walk(manager.model)
    format = format or _found(op, Path(path))
    own = {key: options.pop(key) for key in _LOAD[format] if key in options}
    bundle = _read(op, Path(path), format, modules, own)
    put(op, manager, bundle, name, method, options)
    return manager


def _alpha(op: str, options: dict[str, Any]) -> float | None:
    alpha = options.get("alpha")
    if alpha is None:
        return None
    _checks.require(number(op, "alpha", alpha) != 0.0, op, "alpha", "be other than 0", alpha)
    return float(alpha)


def _found(op: str, path: Path) -> str:
    """The format of the file or folder at ``path``."""
    if not path.is_file():
        return "peft"
    found, _ = tensors.read(op, path)
    rule = "be a folder for PEFT's format, with its adapter_config.json"
    _checks.require(
        not any(key.startswith("base_model.") for key in found), op, "path", rule, f"the file {str(path)!r}"
    )
    lora = any(key.endswith(".lora_A") for key in found)
    return "loralib" if lora or path.suffix in tensors.TORCH else "kohya"


def _read(op: str, path: Path, format: str, modules: dict[str, nn.Module], own: dict[str, Any]) -> Bundle:
    if format == "peft":
        bundle = safe.read_folder(op, path, lambda folder: peft.read(op, folder))
        for name, part in bundle.parts.items():
            if name in modules:
                peft_config.check_layer(op, name, modules[name], part)
        return bundle
    if format == "kohya":
        return kohya.read(op, path, modules, own.get("prefix"))
    return loralib.read(op, path, modules, _alpha(op, own), own.get("enable_lora"))
