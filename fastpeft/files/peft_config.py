"""PEFT's adapter_config.json, read and written."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from fastpeft.files.bundle import PROMPTS, Bundle, Part, alpha_of, common, most_common
from fastpeft.ops import _checks

TYPES = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "PROMPT_TUNING": "prompt_tuning",
    "P_TUNING": "ptuning",
    "PREFIX_TUNING": "prefix_tuning",
}
# The method, the keys that our readers look up, and keys on which the output does not depend.
_HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "megatron_core",
    "qalora_group_size", "runtime_config", "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2",
    "orth_reg_weight", "total_step", "num_virtual_tokens", "token_dim", "num_transformer_submodules",
    "num_attention_heads", "num_layers", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
    "tokenizer_kwargs", "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
    "encoder_dropout", "prefix_projection", "init_lora_weights", "bias", "ensure_weight_tying",
}  # fmt: skip
# Schemes that subtract the update's initial value from the base weight and so change the base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip
_MOST = 1e30  # excludes NaN, infinity and integers that no float can hold
_EPSILON = 1e-5  # PEFT's AdaLoRA divides by its rank plus this


def kind_of(op: str, where: str, config: dict[str, Any]) -> str:
    """The method, under our name.

    Raises     ValueError: an unsupported method, or an option that changes what the method computes.
    """
    method = str(config.get("peft_type")).rpartition(".")[2]
    rule = f"be one of {', '.join(TYPES)}, the methods that PEFT and fastpeft share"
    _checks.require(method in TYPES, op, f"peft_type in {where}", rule, repr(config.get("peft_type")))
    for name, value in config.items():
        asked = bool(value) and name not in _HARMLESS
        _checks.require(not asked, op, f"{name} in {where}", "be unset: fastpeft has no such option", repr(value)[:80])
    _checks.require(config.get("bias") in (None, "none"), op, f"bias in {where}",
                    "be 'none': the biases of the base would change", repr(config.get("bias")))  # fmt: skip
    init = config.get("init_lora_weights")
    changes = isinstance(init, str) and init.startswith(_CHANGES_BASE)
    rule = "be one that leaves the base weights; convert it on saving (path_initial_model_for_weight_conversion)"
    _checks.require(not changes, op, f"init_lora_weights in {where}", rule, repr(init))
    return TYPES[method]


def names(op: str, where: str, config: dict[str, Any], name: str) -> list[str]:
    value = config.get(name)
    sound = value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value))
    _checks.require(sound, op, f"{name} in {where}", "be null or a list of names", repr(value)[:80])
    return list(value or [])


def number_in(op: str, where: str, config: dict[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    value = default if value is None else value
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and -_MOST < value < _MOST
    _checks.require(sound, op, f"{name} in {where}", f"be a number below {_MOST:g}", repr(value)[:80])
    return value


def integer_in(op: str, where: str, config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    sound = isinstance(value, int) and not isinstance(value, bool) and value > 0
    _checks.require(sound, op, f"{name} in {where}", "be a positive integer", repr(value)[:80])
    assert isinstance(value, int)
    return value


def _pattern(op: str, where: str, config: dict[str, Any], name: str, path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of ``path``, as PEFT looks it up."""
    patterns = config.get(name) or {}
    _checks.require(isinstance(patterns, dict), op, f"{name} in {where}", "be an object", type(patterns).__name__)
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return number_in(op, where, patterns, pattern, default)
        except re.error as error:
            raise ValueError(f"{op}: {name} in {where} must hold regular expressions, got {pattern!r}") from error
    return default


def set_scaling(op: str, where: str, config: dict[str, Any], path: str, part: Part, kind: str) -> None:
    """Set scaling and α of one layer, and check its rank against the config's."""
    if kind == "adalora":
        full = number_in(op, where, config, "init_r", 12)
        kept = (config.get("rank_pattern") or {}).get(f"{path}.lora_E")
        rank = full if kept is None else sum(map(bool, kept)) if isinstance(kept, list) else -1
        alpha = number_in(op, where, config, "lora_alpha", 8)
        part.scaling = (alpha if alpha > 0 else float(full)) / (full + _EPSILON)
        part.full_rank = int(full)
    else:
        rank = _pattern(op, where, config, "rank_pattern", path, number_in(op, where, config, "r", 8))
        alpha = _pattern(op, where, config, "alpha_pattern", path, number_in(op, where, config, "lora_alpha", 8))
        part.use_rslora, part.alpha = bool(config.get("use_rslora")), alpha
        part.scaling = alpha / (math.sqrt(rank) if part.use_rslora else rank) if rank > 0 else 0.0
    rule = f"have {rank} rows, the rank that {where} says"
    _checks.require(part.a.shape[0] == rank, op, part.named("a"), rule, list(part.a.shape))


def make(op: str, bundle: Bundle, model: dict[str, nn.Module], said: dict[str, Any]) -> dict[str, Any]:
    """The config of an adapter on a model of these modules, {name: module}.

    Raises     ValueError: something that PEFT's config cannot express.
    """
    task = said.get("task_type") or _task(model[""])
    base = said.get("base_model") or getattr(getattr(model[""], "config", None), "_name_or_path", None) or None
    config: dict[str, Any] = {"base_model_name_or_path": base, "task_type": task, "inference_mode": True}
    config["peft_type"] = next(name for name, kind in TYPES.items() if kind == bundle.kind)
    config["modules_to_save"] = sorted(bundle.modules) or None
    if bundle.kind in PROMPTS:
        return config | _prompt(op, bundle, model[""])
    for path, part in bundle.parts.items():
        check_layer(op, path, model[path], part)
    config |= {"bias": "none", "fan_in_fan_out": any(_fan_in_fan_out(model[path]) for path in bundle.parts)}
    config["lora_dropout"] = bundle.dropout
    config["target_modules"] = _targets(list(bundle.parts), list(model), bundle.modules)
    return config | (_adalora(op, bundle) if bundle.kind == "adalora" else _lora(bundle))


def _task(model: Any) -> str | None:
    name = type(model).__name__
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def _fan_in_fan_out(module: Any) -> bool:
    return type(getattr(module, "layer", module)).__name__ == "Conv1D"


def check_layer(op: str, path: str, module: Any, part: Part) -> None:
    """PEFT's convolutions support neither groups nor dilation nor a padding mode."""
    layer = getattr(module, "layer", module)
    if not hasattr(layer, "padding_mode"):
        return
    plain = layer.groups == 1 and all(each == 1 for each in layer.dilation) and layer.padding_mode == "zeros"
    rule = "have groups=1, dilation=1 and padding_mode='zeros': PEFT's LoRA computes something else there"
    _checks.require(
        plain, op, f"the convolution {path!r}", rule, f"{layer.groups}, {layer.dilation}, {layer.padding_mode!r}"
    )


def _lora(bundle: Bundle) -> dict[str, Any]:
    parts = bundle.parts
    ranked = all(p.use_rslora and p.alpha is not None and p.alpha / math.sqrt(p.rank) == p.scaling
                 for p in parts.values())  # fmt: skip

    def alpha(part: Part) -> float:
        if part.alpha is not None and part.alpha / (math.sqrt(part.rank) if ranked else part.rank) == part.scaling:
            return int(part.alpha) if part.alpha == int(part.alpha) else part.alpha
        return alpha_of(part.scaling, part.rank)

    alphas = {path: alpha(part) for path, part in parts.items()}
    r, usual = most_common(part.rank for part in parts.values()), most_common(alphas.values())
    return {
        "r": r, "lora_alpha": usual, "use_rslora": ranked,
        "lora_bias": any(part.bias is not None for part in parts.values()),
        # Anchored and escaped: PEFT matches the end of a name with a regular expression.
        "rank_pattern": {f"^{re.escape(p)}": part.rank for p, part in parts.items() if part.rank != r},
        "alpha_pattern": {f"^{re.escape(p)}": each for p, each in alphas.items() if each != usual},
    }  # fmt: skip


def _adalora(op: str, bundle: Bundle) -> dict[str, Any]:
    parts = bundle.parts
    biased = [path for path, part in parts.items() if part.bias is not None]
    _checks.require(not biased, op, "bias", "be False: PEFT's AdaLoRA has none", biased[:3])
    full = common(op, "the rank that AdaLoRA begins with", (part.full_rank for part in parts.values()))
    scaling = common(op, "the scaling of AdaLoRA", (part.scaling for part in parts.values()))
    pattern = None
    if any(part.rank != full for part in parts.values()):
        pattern = {f"{p}.lora_E": [i < part.rank for i in range(full)] for p, part in parts.items()}
    # A schedule of one step: it has no effect on an adapter that is only used, not trained.
    return {
        "r": 8, "init_r": full, "target_r": full, "lora_alpha": alpha_of(scaling, full + _EPSILON),
        "rank_pattern": pattern, "tinit": 0, "tfinal": 0, "total_step": 1,
    }  # fmt: skip


def _prompt(op: str, bundle: Bundle, model: Any) -> dict[str, Any]:
    sizes, table = bundle.sizes, bundle.table
    assert table is not None
    known = hasattr(model, "config") and hasattr(model, "get_input_embeddings")
    rule = "be a transformers model for virtual tokens in PEFT's format"
    _checks.require(known, op, "model", rule, type(model).__name__)
    config = {"num_virtual_tokens": table.shape[0], "num_transformer_submodules": 1}
    config |= {
        "token_dim": table.shape[1],
        "num_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
    }
    if bundle.kind == "prompt_tuning":
        return config | {"prompt_tuning_init": "RANDOM"}
    if bundle.kind == "ptuning":
        extra = {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": table.shape[1]}
        return config | extra | {"encoder_num_layers": 2, "encoder_dropout": bundle.dropout}
    decoder = not model.config.is_encoder_decoder and _task(model) == "CAUSAL_LM"
    rule = "be a causal language model for a prefix in PEFT's format: PEFT's own goes wrong in encoders and in T5"
    _checks.require(decoder, op, "model", rule, type(model).__name__)
    heads = sizes["num_kv_heads"]
    dims = {"num_attention_heads": heads, "token_dim": heads * sizes["head_dim"]}
    return config | dims | {"prefix_projection": False, "encoder_hidden_size": dims["token_dim"]}


def _targets(paths: list[str], model: list[str], saved: list[str]) -> list[str] | str:
    """Target names that match exactly these modules of the model: the ends of their names, or their full names."""
    free = [name for name in model if not any(re.match(rf"(^|.*\.){each}($|\..*)", name) for each in saved)]

    def meant(names: list[str]) -> bool:
        ends = tuple(f".{name}" for name in names)
        return {name for name in free if name in names or name.endswith(ends)} == set(paths)

    short = sorted({path.rpartition(".")[2] for path in paths})
    # PEFT matches a lone number correctly, but it would puzzle a human reader of the file.
    if meant(short) and not any(name.isdigit() for name in short):
        return short
    if meant(paths):
        return sorted(paths)
    return f"(?:{'|'.join(re.escape(path) for path in sorted(paths))})"
