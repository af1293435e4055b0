"""Saving a manager's adapters to a file and loading them: everything is checked before anything changes."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn

from fastpeft.manager import archive, options
from fastpeft.manager.merging import Merging
from fastpeft.ops import _checks

_VERSION = 1


class Saving(Merging):
    """save_efficient_weights and load_efficient_weights."""

    def save_efficient_weights(self, path: str | os.PathLike[str]) -> None:
        """Save every adapter, with its options, and the modules named in ``modules_to_save`` in one file.

        path       ending in .pt, .pth or .bin: torch's archive, which ``torch.load`` opens with weights_only=True; any
                   other: safetensors (``pip install fastpeft[files]``). The file is written to a temporary name,
                   flushed and renamed, so a crash leaves the old file whole.
        A tensor that several adapters share is stored once. Merged adapters are saved in their unmerged form.
        Raises     ValueError: no adapter, or a sharded one.  ImportError: no safetensors.  OSError.
        """
        _checks.require(bool(self.methods), "save_efficient_weights", "model", "have adapters", "none")
        tensors, ties = self._tensors()
        for name, value in tensors.items():
            whole = not hasattr(value, "full_tensor") and not value.is_meta
            _checks.require(whole, "save_efficient_weights", name, "be a whole tensor", type(value).__name__)
        archive.write(path, tensors, self._about() | {"version": _VERSION, "ties": ties})

    def load_efficient_weights(self, path: str | os.PathLike[str]) -> None:
        """Load what ``save_efficient_weights`` saved into the adapters of this manager.

        A manager without adapters first applies those of the file, with the options stored there. Shared tensors are
        shared again. Names, methods, shapes, dtypes and values are all checked first; nothing in the file is executed.
        Raises     FileNotFoundError.  ValueError, TypeError: a file that does not fit, or is not ours; nothing has been
                   changed then.
        """
        op = "load_efficient_weights"
        tensors, about = archive.read(op, path)
        _check_about(op, about)
        fresh = not self.methods
        if fresh:
            self._apply_again(op, about)
        try:
            staged = self._staged(op, tensors, about)
        except BaseException:
            if fresh:
                self.unload()
            raise
        for entry in self.entries:
            entry.forget_packed()
        self._unmerge(self.entries)
        self._tie(about["ties"])
        with torch.no_grad():
            for prefix, module in self._modules().items():
                if staged.get(prefix):
                    module.load_state_dict(staged[prefix], strict=False)

    def _about(self) -> dict[str, Any]:
        """The adapters and how to apply them again, as JSON."""
        adapters = []
        for name, record in self.methods.items():
            how = options.to_json(record["options"])
            each = {path: options.to_json(more) for path, more in record["each"].items()}
            paths = [entry.path for entry in self._of(name)]
            adapters.append({"name": name, "method": record["method"], "paths": paths, "options": how, "each": each})
        return {"adapters": adapters, "saved": list(self.saved_modules)}

    def _named(self) -> dict[str, torch.Tensor]:
        named = {f"{e.adapter}/{e.path}/{key}": value for e in self.entries for key, value in e.state().items()}
        for path, module in self.saved_modules.items():
            named |= {f"/{path}/{key}": value for key, value in module.state_dict(keep_vars=True).items()}
        return named

    def _tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Every tensor once, under the first of its names; {another name: the first}."""
        named = self._named()
        first: dict[int, str] = {}
        for name, value in named.items():
            first.setdefault(id(value), name)
        ties = {name: first[id(value)] for name, value in named.items() if first[id(value)] != name}
        return {name: value for name, value in named.items() if name not in ties}, ties

    def _modules(self) -> dict[str, nn.Module]:
        modules = {f"{entry.adapter}/{entry.path}/": entry.module for entry in self.entries}
        return modules | {f"/{path}/": module for path, module in self.saved_modules.items()}

    def _apply_again(self, op: str, about: dict[str, Any]) -> None:
        """Apply the adapters of a file, in its order; none of them if one cannot be applied."""
        try:
            for record in about["adapters"]:
                name, method = record["name"], record["method"]
                told = record["options"] is not None and None not in record["each"].values()
                rule = f"be given with apply_{method} before loading adapter {name!r}: the file cannot hold them all"
                _checks.require(told, op, "options", rule, None)
                how = options.from_json(record["options"])
                if record["paths"] == [""]:
                    self._prompt(method, how | {"adapter_name": name})
                    continue
                each = {path: options.from_json(more) for path, more in record["each"].items()}
                self._place(f"apply_{method}", self._free_name(op, method, name), method, record["paths"], how, each)
            if about["saved"]:
                self._save_whole(self._named_modules(op, about["saved"]))
        except BaseException as error:
            self.unload()
            if isinstance(error, (AttributeError, KeyError)):
                raise ValueError(f"{op}: path must hold adapters of ours, got {error}") from error
            raise

    def _staged(self, op: str, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """{prefix: state dict} of a file that fits; each has first been loaded into a copy of its module."""
        mine = {each["name"]: (each["method"], sorted(each["paths"])) for each in self._about()["adapters"]}
        theirs = {each["name"]: (each["method"], sorted(each["paths"])) for each in about["adapters"]}
        _checks.require(mine == theirs, op, "path", f"hold the adapters {mine}", theirs)
        saved, whole = sorted(self.saved_modules), sorted(about["saved"])
        _checks.require(saved == whole, op, "path", f"hold the modules {saved}", whole)
        named, ties = self._named(), about["ties"]
        held = {**tensors, **{name: tensors[first] for name, first in ties.items() if first in tensors}}
        for name, first in self._tensors()[1].items():
            shared = name in held and ties.get(name, name) == ties.get(first, first)
            _checks.require(shared, op, name, f"be shared with {first} in the file", "a tensor of its own")
        for name, value in held.items():
            _check_value(op, name, value, named.get(name))
        staged: dict[str, dict[str, Any]] = {}
        for prefix, module in self._modules().items():
            keys = {name.removeprefix(prefix): value for name, value in held.items() if name.startswith(prefix)}
            staged[prefix] = keys
            own = {name.removeprefix(prefix) for name in named if name.startswith(prefix)}
            _rehearse(op, prefix, module, keys, own)
        foreign = sorted(held.keys() - {prefix + key for prefix, keys in staged.items() for key in keys})
        _checks.require(not foreign, op, "path", "hold the tensors of these adapters", foreign[:3])
        return staged

    def _tie(self, ties: dict[str, str]) -> None:
        """Share one Parameter where the file stores a tensor once."""
        place: dict[str, tuple[dict[str, Any], str]] = {}
        for prefix, module in self._modules().items():
            for path, child in module.named_modules():
                for held in (child._parameters, child._buffers):
                    place |= {f"{prefix}{path}{'.' if path else ''}{key}": (held, key) for key in held}
        for name, first in ties.items():
            if name in place and first in place:
                (held, key), (source, source_key) = place[name], place[first]
                held[key] = source[source_key]


def _check_about(op: str, about: dict[str, Any]) -> None:
    """Check that the file's description of itself has the required form."""
    known = about.get("version") == _VERSION
    _checks.require(known, op, "path", f"be of version {_VERSION} of this format", about.get("version"))
    adapters, ties, saved = about.get("adapters"), about.get("ties"), about.get("saved")
    sound = isinstance(adapters, list) and isinstance(ties, dict) and isinstance(saved, list)
    keys = {"name": str, "method": str, "paths": list, "each": dict}
    for record in adapters if sound and isinstance(adapters, list) else []:
        sound = sound and isinstance(record, dict) and all(isinstance(record.get(k), kind) for k, kind in keys.items())
        sound = sound and isinstance(record.get("options"), (dict, type(None)))
    _checks.require(sound, op, "path", "say which adapters it holds", "something else")


def _check_value(op: str, name: str, value: torch.Tensor, like: torch.Tensor | None) -> None:
    # Masks may come as bits, booleans or floats: the module decides what it accepts.
    floats = like is not None and like.is_floating_point()
    same = value.is_floating_point() or not floats
    _checks.require_dtype(same, op, name, f"have a dtype like {like.dtype if like is not None else None}", value.dtype)
    if value.is_floating_point():
        finite = bool((value.to(like.dtype) if like is not None and floats else value).isfinite().all())
        _checks.require(finite, op, name, "be finite", "inf or nan")


def _rehearse(op: str, prefix: str, module: nn.Module, state: dict[str, Any], own: set[str]) -> None:
    """Load into a copy first: only the module itself can check shapes, packed masks and shrunk ranks.

    own        the names of the adapter's tensors in ``module``; the base's tensors are not copied
    """
    base = {id(p): nn.Parameter(p.detach().to("meta"), False) for name, p in module.named_parameters()
            if name not in own}  # fmt: skip
    twin = copy.deepcopy(module, dict(base))
    try:
        missing, foreign = twin.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{op}: path must fit the adapter at {prefix}, got {error}") from error
    # A table may replace the encoder that makes it: the copy is then baked, and nothing is missing.
    gone = sorted((own & set(missing)) | (own & twin.state_dict().keys() - state.keys()))
    _checks.require(not gone and not foreign, op, "path", f"hold the tensors of the adapter at {prefix}",
                    f"{gone[:3]} missing, {foreign[:3]} unknown")  # fmt: skip
