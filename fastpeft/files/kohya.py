"""The files of kohya's sd-scripts and of LyCORIS: one safetensors file, a module's dots as underscores.

<prefix>_<module>.lora_down.weight   [r, K]; of a convolution [r, C / groups, *kernel]
<prefix>_<module>.lora_up.weight     [N, r]; of a convolution [N, r, 1, …]
<prefix>_<module>.lora_mid.weight    [r, r, *kernel], with lora_down [r, C, 1, …]: the Tucker form of a convolution
<prefix>_<module>.alpha              scaling is alpha / r; missing, or 0: scaling 1
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft.files import tensors
from fastpeft.files.bundle import Bundle, Part, alpha_of, check_float, kernel_of
from fastpeft.ops import _checks

PREFIXES = ("lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lora_transformer", "lora_prior", "lycoris")
_DOWN, _UP, _MID, _ALPHA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha"
_PARTS = {_DOWN: "a", _UP: "b", _MID: "mid", _ALPHA: "alpha"}


def written(op: str, paths: Iterable[str]) -> dict[str, str]:
    """{a module's name with underscores: its name}.

    Raises     ValueError: two modules that have the same written name.
    """
    found: dict[str, str] = {}
    for path in paths:
        name = path.replace(".", "_")
        rule = f"be written otherwise than {found.get(name)!r} in kohya's format"
        _checks.require(name not in found, op, f"module {path!r}", rule, repr(name))
        found[name] = path
    return found


def write(op: str, file: Path, bundle: Bundle, prefix: str, tucker: bool) -> None:
    """One safetensors file.

    tucker     write convolutions with a kernel larger than 1 with a lora_mid
    Raises     ValueError: something that the format cannot store.
    """
    bundle = bundle.as_lora()
    _checks.require(bundle.kind == "lora", op, "method", "be LoRA for kohya's format", bundle.kind)
    _checks.require(not bundle.whole, op, "modules_to_save", "be empty for kohya's format", bundle.modules)
    found: dict[str, torch.Tensor] = {}
    for name, path in written(op, bundle.parts).items():
        part, key = bundle.parts[path], f"{prefix}_{name}"
        _checks.require(part.bias is None, op, f"bias of {path!r}", "be None for kohya's format", "lora_bias")
        kernel = part.a.shape[2:]
        ones = [1] * len(kernel)
        down = part.a
        if tucker and any(size != 1 for size in kernel):
            down, found[f"{key}.{_MID}"] = _apart(op, path, part.a)
        found[f"{key}.{_DOWN}"] = down
        found[f"{key}.{_UP}"] = part.b.view(*part.b.shape, *ones)
        found[f"{key}.{_ALPHA}"] = torch.tensor(float(alpha_of(part.scaling, part.rank)))
    tensors.write(op, file, found, _metadata(bundle))


def _metadata(bundle: Bundle) -> dict[str, str]:
    """The metadata that the tools show; "Dynamic" if layers differ."""
    ranks = {part.rank for part in bundle.parts.values()}
    alphas = {alpha_of(part.scaling, part.rank) for part in bundle.parts.values()}
    rank, alpha = (str(next(iter(each))) if len(each) == 1 else "Dynamic" for each in (ranks, alphas))
    return {"ss_network_module": "lycoris.kohya", "ss_network_dim": rank, "ss_network_alpha": alpha}


def _apart(op: str, path: str, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(down [r, C, 1, …], mid [r, r, *kernel]) with a[m, c, k] = Σₙ mid[m, n, k] down[n, c]."""
    r, C, *kernel = a.shape
    matrix = a.double().movedim(1, -1).reshape(-1, C)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    lost = float(s[r:].norm() / s.norm()) if s.norm() > 0 else 0.0
    rule = f"have at most {r} independent input channels in lora_A for tucker=True"
    _checks.require(lost <= 1e-6, op, f"the convolution {path!r}", rule, f"{lost:.1e} of it beyond them")
    n = min(r, len(s))
    root = s[:n].sqrt()
    down, mid = a.new_zeros(r, C), a.new_zeros(r, r, *kernel)
    down[:n] = root[:, None] * v[:n]
    mid[:, :n] = (u[:, :n] * root).view(r, *kernel, n).movedim(-1, 1)
    return down.view(r, C, *[1] * len(kernel)), mid


def read(op: str, file: Path, model: dict[str, nn.Module], prefix: str | None) -> Bundle:
    """The adapter in ``file``.

    model      {name: module} of the model that the adapter is for
    prefix     selects the modules; None: the only prefix in the file
    Raises     FileNotFoundError.  ValueError, TypeError: as `peft.read`.
    """
    found, _ = tensors.read(op, file)
    by_name: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    for key, value in found.items():
        name, _, suffix = key.partition(".")
        other = _other(suffix)
        rule = f"be one of {', '.join(_PARTS)}: fastpeft reads LoRA and LoCon of this format"
        _checks.require(suffix in _PARTS, op, f"{key} in {file}", rule, other)
        by_name.setdefault(name, {})[_PARTS[suffix]] = (f"{key} in {file}", value)
    _checks.require(bool(by_name), op, str(file), "hold tensors", "none")
    bundle = Bundle("lora")
    modules = _modules(op, file, by_name, model, prefix)
    for name, path in modules.items():
        bundle.parts[path] = _part(op, by_name[name], model[path])
    bundle.check(op)
    return bundle


def _other(suffix: str) -> str:
    kinds = {
        "dora_scale": "DoRA",
        "hada_": "LoHa",
        "lokr_": "LoKr",
        "oft_": "OFT",
        "on_input": "IA3",
        "diff": "a full difference",
    }
    return next((kind for start, kind in kinds.items() if suffix.startswith(start)), repr(suffix))


def _modules(
    op: str, file: Path, names: Iterable[str], model: dict[str, nn.Module], prefix: str | None
) -> dict[str, str]:
    """{name in the file: name of the module} of those with the prefix."""
    of_model: dict[str, list[str]] = {}
    for path in model:
        of_model.setdefault(path.replace(".", "_"), []).append(path)
    heads = {
        name: next((p for p in sorted(PREFIXES, key=len, reverse=True) if name.startswith(f"{p}_")), "")
        for name in names
    }
    if prefix is None:
        several = sorted(set(heads.values()))
        rule = "be given for a file with modules of several models"
        _checks.require(len(several) == 1, op, "prefix", rule, several)
        prefix = several[0]
    start = f"{prefix}_" if prefix else ""
    wanted = [name for name in heads if name.startswith(start)]
    rule = f"be one of those in {file}: {', '.join(sorted(set(heads.values())))}"
    _checks.require(bool(wanted), op, "prefix", rule, repr(prefix))
    foreign = [name for name in heads if not name.startswith(start) and not heads[name]]
    _checks.require(
        not foreign, op, str(file), f"have names that begin with {start} or another known prefix", foreign[:3]
    )
    found = {}
    for name in wanted:
        paths = of_model.get(name.removeprefix(start), [])
        rule = "name one module of the model"
        _checks.require(len(paths) == 1, op, f"{name} in {file}", rule, " and ".join(paths) or "none")
        found[name] = paths[0]
    return found


def _part(op: str, held: dict[str, tuple[str, torch.Tensor]], module: Any) -> Part:
    labels = {name: label for name, (label, _) in held.items()}
    for needed, other in (("a", "b"), ("b", "a")):
        suffix = _DOWN if needed == "a" else _UP
        rule = f"come with {suffix}"
        _checks.require(needed in held, op, labels.get(other, next(iter(labels.values()))), rule, "no such tensor")
    down, up = held["a"][1], held["b"][1]
    pointwise = up.dim() >= 2 and up.shape[1] > 0 and all(size == 1 for size in up.shape[2:])
    _checks.require(pointwise, op, labels["b"], "have shape [out, r] or [out, r, 1, …]", list(up.shape))
    for name in held.keys() - {"alpha"}:
        check_float(op, *held[name])
    _checks.require(down.dim() >= 2, op, labels["a"], "have two dimensions or more", list(down.shape))
    r = up.shape[1]
    if "mid" in held:
        label, mid = held["mid"]
        points = all(size == 1 for size in down.shape[2:])
        _checks.require(points, op, labels["a"], "have a kernel of 1 beside lora_mid", list(down.shape))
        sizes = mid.dim() > 2 and tuple(mid.shape[:2]) == (r, down.shape[0])
        _checks.require(sizes, op, label, f"have shape [{r}, {down.shape[0]}, *kernel]", list(mid.shape))
        down = torch.einsum("mn...,nc->mc...", mid.double(), down.flatten(1).double()).to(down.dtype)
    alpha = _alpha(op, held, r)
    # What one tool writes as a linear layer, another writes as a 1 x 1 convolution.
    kernel = kernel_of(module)
    if all(size == 1 for size in (*down.shape[2:], *kernel)):
        down = down.flatten(1).view(down.shape[0], down.shape[1], *kernel)
    return Part(down, up.flatten(1), alpha / r, alpha=alpha, names=labels)


def _alpha(op: str, held: dict[str, tuple[str, torch.Tensor]], r: int) -> float:
    if "alpha" not in held:
        return float(r)
    label, value = held["alpha"]
    sound = value.numel() == 1 and not value.is_complex() and bool(value.isfinite().all())
    _checks.require(sound, op, label, "be one finite number", list(value.shape) if value.numel() != 1 else value.item())
    return float(value) or float(r)
