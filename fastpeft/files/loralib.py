"""Microsoft's loralib: a state dict of lora_A and lora_B, in torch's archive.

    <module>.lora_A [r, K], lora_B [N, r]               lora.Linear
    <module>.lora_A [n · r, K], lora_B [n · N/m, r]     lora.MergedLinear: n of m equal parts of the output are adapted
    <module>.lora_A [r · k, C · k], lora_B [N · k, r · k]    lora.Conv1d to Conv3d: B A, reshaped, is W's update

The file gives neither lora_alpha nor the adapted parts of a MergedLinear: pass ``alpha`` and ``enable_lora``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft.files import tensors
from fastpeft.files.bundle import Bundle, Part, alpha_of, kernel_of
from fastpeft.ops import _checks


def write(op: str, file: Path, bundle: Bundle, alpha: float | None) -> None:
    """A plain dict of tensors, for ``model.load_state_dict(torch.load(file), strict=False)`` of a loralib model.

    alpha      lora_alpha of loralib's layers; lora_B is rescaled to it; None: the alpha of the layers here, one for all
    Raises     ValueError: something that loralib has no layer for.
    """
    bundle = bundle.as_lora()
    _checks.require(bundle.kind == "lora", op, "method", "be LoRA for loralib's format", bundle.kind)
    own = {alpha_of(part.scaling, part.rank) for part in bundle.parts.values()}
    rule = "be given where the layers' own differ: loralib's file has none"
    _checks.require(alpha is not None or len(own) == 1, op, "alpha", rule, sorted(own)[:4])
    found: dict[str, torch.Tensor] = {}
    for path, part in bundle.parts.items():
        _checks.require(part.bias is None, op, f"bias of {path!r}", "be None for loralib's format", "lora_bias")
        rule = "be a linear layer for loralib's format, whose convolutions have factors of another form"
        _checks.require(part.a.dim() == 2, op, f"module {path!r}", rule, f"lora_A {list(part.a.shape)}")
        factor = 1.0 if alpha is None else part.scaling * part.rank / alpha
        found[f"{path}.lora_A"] = part.a
        found[f"{path}.lora_B"] = part.b if factor == 1.0 else part.b * factor
    tensors.write(op, file, found | bundle.whole)


def read(
    op: str, file: Path, model: dict[str, nn.Module], alpha: float | None, enable_lora: Sequence[bool] | None
) -> Bundle:
    """The adapter in ``file``.

    model      {name: module} of the model that the adapter is for
    alpha      lora_alpha of the layers in which it was trained; None: 1, loralib's default
    enable_lora    of their MergedLinear layers
    Raises     FileNotFoundError.  ValueError, TypeError: as `peft.read`.
    """
    found, _ = tensors.read(op, file)
    bundle = Bundle("lora")
    for key in [key for key in found if key.endswith(".lora_A")]:
        path, other = key.removesuffix(".lora_A"), f"{key[:-1]}B"
        label = f"{key} in {file}"
        _checks.require(other in found, op, label, "come with lora_B", "no such tensor")
        _checks.require(path in model, op, label, "name a module of the model", repr(path))
        a, b = found.pop(key), found.pop(other)
        sound = a.dim() == b.dim() == 2 and min(*a.shape, *b.shape) > 0
        _checks.require(sound, op, label, "be a matrix, and so its lora_B", f"{list(a.shape)}, {list(b.shape)}")
        labels = {"a": label, "b": f"{other} in {file}"}
        bundle.parts[path] = _part(op, a, b, model[path], 1.0 if alpha is None else float(alpha), enable_lora, labels)
    left = [key for key in found if "lora_" in key.rpartition(".")[2]]
    _checks.require(not left, op, f"{left[:1]} in {file}", "be lora_A or lora_B, in pairs", "another")
    _checks.require(bool(bundle.parts), op, str(file), "hold tensors <module>.lora_A", sorted(found)[:3])
    biases = [key for key in found if key.endswith(".bias") and key.removesuffix("bias") + "weight" not in found]
    rule = "hold no bias of a layer that the model has already (lora_state_dict with bias='none')"
    _checks.require(not biases, op, str(file), rule, biases[:3])
    bundle.whole = found
    bundle.names = {key: f"{key} in {file}" for key in found}
    bundle.check(op)
    return bundle


def _part(
    op: str,
    a: torch.Tensor,
    b: torch.Tensor,
    module: Any,
    alpha: float,
    enable_lora: Sequence[bool] | None,
    labels: dict[str, str],
) -> Part:
    kernel = kernel_of(module)
    if kernel:
        return _conv(op, a, b, module, kernel, alpha, labels)
    r = b.shape[1]
    if a.shape[0] == r:
        return Part(a, b, alpha / r, alpha=alpha, names=labels)
    # loralib applies B as a convolution of n groups: here B is block-diagonal, and zero for parts that are not adapted.
    _checks.require(
        a.shape[0] % r == 0, op, labels["a"], f"have a multiple of {r} rows, lora_B's columns", list(a.shape)
    )
    n = a.shape[0] // r
    flags = [True] * n if enable_lora is None else list(enable_lora)
    rule = f"say which parts of the output are adapted, {n} of them"
    got = flags if enable_lora is not None else None
    _checks.require(sum(map(bool, flags)) == n, op, "enable_lora", rule, got)
    rows = b.shape[0] // n
    _checks.require(b.shape[0] % n == 0, op, labels["b"], f"have a multiple of {n} rows", list(b.shape))
    wide = b.new_zeros(len(flags), rows, n, r)
    places = [i for i, flag in enumerate(flags) if flag]
    for group, place in enumerate(places):
        wide[place, :, group] = b[group * rows : (group + 1) * rows]
    return Part(a, wide.view(len(flags) * rows, n * r), alpha / r, alpha=None, names=labels)


def _conv(
    op: str,
    a: torch.Tensor,
    b: torch.Tensor,
    module: Any,
    kernel: tuple[int, ...],
    alpha: float,
    labels: dict[str, str],
) -> Part:
    """(B A) viewed in W's shape, as a product of [N, k · rk] and a block-diagonal [k · rk, C · k²]: exact, rank k²r."""
    layer = getattr(module, "layer", module)
    k = kernel[0]
    served = len(kernel) == 2 and kernel[1] == k and layer.groups == 1
    rule = "have one group, two dimensions and a square kernel: loralib's own update of others does not run"
    got = f"{layer.groups} groups, kernel {kernel}"
    _checks.require(served, op, f"the convolution of {labels['a']}", rule, got)
    N, C = layer.weight.shape[:2]
    rk = b.shape[1]
    fits = rk % k == 0 and tuple(a.shape) == (rk, C * k) and b.shape[0] == N * k
    rule = f"have shape [r · {k}, {C * k}] beside lora_B [{N * k}, r · {k}]"
    _checks.require(fits, op, labels["a"], rule, list(a.shape))
    left = b.view(N, k, rk).reshape(N, k * rk)
    right = torch.block_diag(*[a] * k)
    r = rk // k
    return Part(right.view(k * rk, C, *kernel), left, alpha / r, names=labels)
