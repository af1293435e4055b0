"""Hugging Face PEFT's folders: adapter_config.json beside adapter_model.safetensors.

lora       base_model.model.<module>.lora_A.weight [r, K], lora_B.weight [N, r], lora_B.bias [N]; of a convolution
           [r, C, *kernel] and [N, r, 1, …]
adalora    base_model.model.<module>.lora_A [r, K], lora_B [N, r], lora_E [r, 1]; scaling lora_alpha / (init_r + 1e-5)
prompts    prompt_embeddings [P, width]: the encoder's output
whole modules (modules_to_save) under their own names, after the same prefix
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from fastpeft.files import peft_config, tensors
from fastpeft.files.bundle import PROMPTS, Bundle, Part
from fastpeft.ops import _checks

CONFIG, STEM = "adapter_config.json", "adapter_model"
PREFIX = "base_model.model."

_LORA = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_B.bias": "bias"}
_ADALORA = {"lora_A": "a", "lora_B": "b", "lora_E": "gain"}
# Key parts that mark files of other methods, or of LoRA with options that are not supported.
_FOREIGN = ("lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B", "ia3_l", "hada_w", "lokr_w", "vera_lambda")


def owned(name: str) -> bool:
    """Whether a file of a folder is a part of the adapter."""
    return name == CONFIG or name.startswith(f"{STEM}.") or bool(re.fullmatch(rf"{STEM}-\d+-of-\d+\.safetensors", name))


def write(op: str, folder: Path, bundle: Bundle, model: Any, most: int | None, said: dict[str, Any]) -> None:
    """Write into an empty ``folder``.

    model      {name: module} of the model that has the adapter
    most       bytes per shard
    said       ``base_model`` and ``task_type``, if given
    Raises     ValueError: something that PEFT cannot store.
    """
    config = peft_config.make(op, bundle, model, said)
    found: dict[str, torch.Tensor] = {}
    for path, part in bundle.parts.items():
        suffixes = _ADALORA if bundle.kind == "adalora" else _LORA
        for suffix, name in suffixes.items():
            value = getattr(part, name)
            if name == "bias" and value is None and config.get("lora_bias"):
                value = part.b.new_zeros(part.b.shape[0])
            if value is not None:
                kernel = part.a.dim() - 2 if name == "b" else 0
                found[f"{PREFIX}{path}.{suffix}"] = value.view(*value.shape, *[1] * kernel)
    if bundle.table is not None:
        found["prompt_embeddings"] = bundle.table
    found |= {f"{_prefix(bundle.kind)}{key}": value for key, value in bundle.whole.items()}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors.write_sharded(op, folder, STEM, found, most, {})


def _prefix(kind: str) -> str:
    # PEFT wraps the model directly for virtual tokens; for adapters it wraps a tuner that wraps the model.
    return "base_model." if kind in PROMPTS else PREFIX


def read(op: str, folder: Path) -> Bundle:
    """The adapter in ``folder``, with every tensor accounted for.

    Raises     FileNotFoundError.  ValueError, TypeError: an unsupported method or option, a tensor that is missing,
               unknown, or not what the config says.
    """
    config = tensors.read_json(op, folder / CONFIG)
    where = str(folder / CONFIG)
    kind = peft_config.kind_of(op, where, config)
    found, files = tensors.read_sharded(op, folder, STEM)
    bundle = Bundle(kind, modules=peft_config.names(op, where, config, "modules_to_save"))
    rest = dict(found)
    if kind in PROMPTS:
        _read_table(op, where, config, folder, bundle, rest, files)
    else:
        _read_parts(op, where, config, folder, bundle, rest, files)
    prefix = _prefix(kind)
    for key, value in rest.items():
        label = f"{key} in {folder / files[key]}"
        foreign = next((name for name in _FOREIGN if name in key), None)
        _checks.require(foreign is None, op, label, "be a tensor of a method that fastpeft reads", foreign)
        known = key.startswith(prefix)
        _checks.require(known, op, label, f"be named {prefix}<module>.<tensor>, or as the method has it", key)
        bundle.whole[key.removeprefix(prefix)] = value
        bundle.names[key.removeprefix(prefix)] = label
    bundle.check(op)
    return bundle


def _read_parts(
    op: str, where: str, config: dict[str, Any], folder: Path, bundle: Bundle, rest: dict[str, Any], files: Any
) -> None:
    suffixes = _ADALORA if bundle.kind == "adalora" else _LORA
    by_path: dict[str, dict[str, str]] = {}
    for key in list(rest):
        for suffix, name in suffixes.items():
            if key.startswith(PREFIX) and key.endswith(f".{suffix}"):
                by_path.setdefault(key[len(PREFIX) : -len(suffix) - 1], {})[name] = key
    _checks.require(bool(by_path), op, str(folder), f"hold tensors {PREFIX}<module>.{next(iter(suffixes))}", "none")
    needed = set(suffixes.values()) - {"bias"}
    bundle.dropout = peft_config.number_in(op, where, config, "lora_dropout", 0.0)
    for path, keys in by_path.items():
        labels = {name: f"{key} in {folder / files[key]}" for name, key in keys.items()}
        missing = sorted(needed - keys.keys())
        names = {name: suffix for suffix, name in suffixes.items()}
        rule = f"come with {names[missing[0]]}" if missing else ""
        _checks.require(not missing, op, next(iter(labels.values())), rule, "no such tensor")
        held = {name: rest.pop(key) for name, key in keys.items()}
        b = held["b"]
        pointwise = b.dim() >= 2 and all(size == 1 for size in b.shape[2:]) and b.dim() in (2, held["a"].dim())
        _checks.require(pointwise, op, labels["b"], "have shape [out, r] or [out, r, 1, …]", list(b.shape))
        part = Part(held["a"], b.flatten(1), 0.0, held.get("gain"), held.get("bias"), names=labels)
        peft_config.set_scaling(op, where, config, path, part, bundle.kind)
        bundle.parts[path] = part


def _read_table(
    op: str, where: str, config: dict[str, Any], folder: Path, bundle: Bundle, rest: dict[str, Any], files: Any
) -> None:
    key = "prompt_embeddings"
    _checks.require(key in rest, op, str(folder), f"hold a tensor {key}", sorted(rest)[:3])
    table = rest.pop(key)
    bundle.names["table"] = f"{key} in {folder / files[key]}"
    P = peft_config.integer_in(op, where, config, "num_virtual_tokens")
    rows = table.shape[0] if table.dim() == 2 else 0
    # For an encoder-decoder, PEFT uses and trains only the first half of the prompt.
    several = config.get("num_transformer_submodules") or 1
    rule = f"have {P} rows, as {CONFIG} says"
    _checks.require(rows in (P, P * several), op, bundle.named("table"), rule, list(table.shape))
    bundle.table = table[:P]
    if bundle.kind == "prefix_tuning":
        L, H = (peft_config.integer_in(op, where, config, name) for name in ("num_layers", "num_attention_heads"))
        d = peft_config.integer_in(op, where, config, "token_dim")
        fits = d % H == 0 and table.shape[1] == 2 * L * d
        rule = f"have {2 * L * d} columns, 2 · num_layers · token_dim of {CONFIG}"
        _checks.require(fits, op, bundle.named("table"), rule, list(table.shape))
        rule = "be 1 for prefix tuning: PEFT hands one layer's prefix to two of an encoder-decoder"
        _checks.require(several == 1, op, f"num_transformer_submodules in {where}", rule, several)
        bundle.sizes = {"num_layers": L, "num_kv_heads": H, "head_dim": d // H}
