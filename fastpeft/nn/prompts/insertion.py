"""Prompts and prefixes into transformers models, and out of them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fastpeft.nn.config import flag
from fastpeft.nn.prompts.checkpointing import CACHE_NAMES
from fastpeft.nn.prompts.hosts import RECORD, Host, Inserted, host
from fastpeft.nn.prompts.prefix import Prefix
from fastpeft.nn.prompts.prefix_host import PrefixHost
from fastpeft.nn.prompts.prompt_host import CrossHost, PromptHost
from fastpeft.nn.prompts.virtual import Prompt
from fastpeft.ops import _checks

_UNEVEN = ("kv_lora_rank", "global_head_dim", "v_head_dim")
_TABLES = ("wpe", "position_embeddings", "embed_positions")
_ATTENDING = ("full_attention", "sliding_attention", "chunked_attention")


def insert_prompt(model: Any, prompt: Prompt, *, freeze_base: bool = True) -> Any:
    """Put ``prompt`` before the embeddings of every sequence that ``model`` reads; change and return ``model``.

    model      a transformers model that reads token ids: decoder, encoder (whose first token, which poolers read, is
               then the prompt's), or encoder-decoder, whose encoder gets it
    prompt     PromptEmbedding, PromptEncoder or PTuningEmbedding of the embeddings' width; becomes the submodule
               ``model.prompt``, on their device and in the model's mode
    freeze_base    no parameter that the model had requires gradients afterwards

    The forward and ``generate`` take the same arguments as before and see P + T tokens: masks (2-D, or 4-D bool or
    additive) are extended so that every token sees the prompt, labels of one value a token get -100, span positions and
    ``position_ids`` move up by P. Logits have P + T rows; in an encoder-decoder as many as before. After its first call
    a cache holds the prompt. ``prompt.disable()`` leaves the prompt out.
    Raises     ValueError: width, a second insertion, a name or forward in use.  TypeError: types.
               Nothing is changed then
    """
    op = "insert_prompt"
    _checks.require_dtype(isinstance(prompt, Prompt), op, "prompt", "be a prompt", type(prompt).__name__)
    _check_model(op, model, "prompt", freeze_base)
    nested = bool(model.config.is_encoder_decoder)
    site = model.get_encoder() if nested else model
    _check_forward(op, site)
    embedding = site.get_input_embeddings()
    width = embedding.weight.shape[1]
    _checks.require(prompt.token_dim == width, op, "prompt", f"have token_dim {width}, the model's", prompt.token_dim)
    record = Inserted(op, prompt, filler=_filler(model.config), first=_first(site), causal=_causal(site), nested=nested)
    record.most = _most(site)
    record.cache_name = _cache_name(site) or CACHE_NAMES[0]
    _join(model, "prompt", prompt, record, freeze_base)
    for module in [embedding, *site.modules()]:
        tied = getattr(module, "weight", None) is embedding.weight and isinstance(module, nn.Embedding)
        if (tied or module is embedding) and record.rows not in module._forward_hooks.values():
            module.register_forward_hook(record.rows)
    _become(site, PromptHost, record)
    if nested:
        _become(model, CrossHost, record)
    return model


def insert_prefix(model: Any, prefix: Prefix, *, freeze_base: bool = True) -> Any:
    """Let every self-attention of ``model`` see ``prefix`` before its own keys; change and return ``model``.

    model      a transformers model whose attention takes cached keys and values: decoder, encoder (BERT, RoBERTa, …),
               or encoder-decoder, whose decoder gets it
    prefix     PrefixTuning or PrefixEncoder of the model's layers, key/value heads and head size; becomes the submodule
               ``model.prefix``, on the embeddings' device and in the model's mode
    freeze_base    no parameter that the model had requires gradients afterwards

    Real tokens' positions start at P. Outputs have as many rows as before. A layer with a sliding window sees the
    prefix as far as its window reaches. A cache holds the prefix after its first call; ``generate`` takes any cache.
    Under gradient checkpointing, which drops caches, every recomputed layer is handed its part of the prefix: the
    gradient is the same; reentrant checkpointing would give none and is refused.
    Raises     ValueError: heads, width or layers, a model without such a cache, a second insertion.  TypeError: types.
               Nothing is changed then
    """
    op = "insert_prefix"
    _checks.require_dtype(isinstance(prefix, Prefix), op, "prefix", "be a prefix", type(prefix).__name__)
    _check_model(op, model, "prefix", freeze_base)
    site = model if _cache_name(model) else model.base_model
    cache_name = _cache_name(site)
    rule = "take cached keys and values in its forward"
    _checks.require(cache_name is not None, op, "model", rule, type(model).__name__)
    assert cache_name is not None
    counts = not any(hasattr(module, "get_rope_index") for module in model.modules())
    _checks.require(counts, op, "model", "count positions from its cache's length, not by images", type(model).__name__)
    _check_forward(op, site)
    _check_shape(op, model.config, prefix)
    decoder = "decoder_" if model.config.is_encoder_decoder else ""
    record = Inserted(op, prefix, causal=_causal(site), cache_name=cache_name, decoder=decoder)
    record.most = _most(model.get_decoder() if decoder else site)
    _join(model, "prefix", prefix, record, freeze_base)
    _become(site, PrefixHost, record)
    if site is not model:
        setattr(model, RECORD, record)
    return model


def remove_prompt(model: Any) -> Any:
    """Take out what ``insert_prompt`` or ``insert_prefix`` put into ``model``, prompt or prefix; return ``model``.

    Classes, forward, state-dict keys, hooks and ``requires_grad`` are as they were before the insertion; the prompt
    itself keeps its trained values.
    Raises     ValueError: there is none.  TypeError: not a module
    """
    op = "remove_prompt"
    _checks.require_dtype(isinstance(model, nn.Module), op, "model", "be an nn.Module", type(model).__name__)
    record: Inserted | None = model.__dict__.get(RECORD)
    _checks.require(record is not None, op, "model", "have a prompt or prefix of its own", "none")
    assert record is not None
    for module in model.modules():
        if module.__dict__.get(RECORD) is record:
            del module.__dict__[RECORD]
            if isinstance(module, Host):
                module.__class__ = type(module)._source  # type: ignore[attr-defined]
        for key in [key for key, hook in module._forward_hooks.items() if hook is record.rows]:
            del module._forward_hooks[key]
    del model._modules["prompt" if isinstance(record.module, Prompt) else "prefix"]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if record.trained is not None and name in record.trained:
            parameter.requires_grad_(record.trained[name])
    return model


def _check_model(op: str, model: Any, name: str, freeze_base: object) -> None:
    known = isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(model, "get_input_embeddings")
    known = known and hasattr(model, "base_model_prefix") and not hasattr(model, "peft_config")
    _checks.require_dtype(known, op, "model", "be a transformers model (below PEFT's)", type(model).__name__)
    reads = getattr(model, "main_input_name", None)
    _checks.require(reads == "input_ids", op, "model", "read input_ids", reads)
    flag(op, "freeze_base", freeze_base)
    held = [type(m.__dict__[RECORD].module).__name__ for m in model.modules() if RECORD in m.__dict__]
    _checks.require(not held, op, "model", "have no prompt or prefix yet; remove_prompt first", held[:1])
    _checks.require(not hasattr(model, name), op, "model", f"have no attribute named {name}", "one")
    _check_forward(op, model)


def _check_forward(op: str, model: Any) -> None:
    """Refuse a forward set on the instance: it would hide that of the changed class."""
    own = "forward" in model.__dict__
    rule = "run its class's forward; insert before accelerate's hooks, or anything else, replace it"
    _checks.require(not own, op, "model", rule, "one set on the instance")


def _cache_name(model: Any) -> str | None:
    names = inspect.signature(type(model).forward).parameters
    return next((name for name in CACHE_NAMES[:2] if name in names), None)


def _causal(model: nn.Module) -> bool | None:
    said = {held for module in model.modules() if isinstance(held := getattr(module, "is_causal", None), bool)}
    return None if not said else True in said


def _first(model: nn.Module) -> int:
    """RoBERTa's positions begin after that of padding."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            padding: Any = module.padding_idx
            return int(padding) + 1
    return 0


def _most(model: nn.Module) -> int | None:
    """How many tokens a learned table of positions has, if there is one."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _TABLES and isinstance(module, nn.Embedding):
            return module.num_embeddings - (getattr(module, "offset", 0) or _first(model))
    return None


def _filler(config: Any) -> int:
    """An id that no part of a model treats as a special one."""
    special: set[int] = set()
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if name.endswith(("token_id", "token_index", "token_ids")) and value is not None:
                special |= set(value if isinstance(value, (list, tuple)) else [value])
    return next(token for token in range(len(special) + 1) if token not in special)


def _one(config: Any, *names: str) -> int | None:
    return next((held for name in names if isinstance(held := getattr(config, name, None), int)), None)


def _cached(config: Any) -> Any:
    """The part of a config that describes the cache of the prefixed self-attentions."""
    both = bool(config.is_encoder_decoder)
    return (getattr(config, "decoder", None) or config) if both else config.get_text_config(decoder=True)


def prefix_sizes(config: Any) -> dict[str, int]:
    """num_layers, num_kv_heads and head_dim of a model's prefix, from its config."""
    both, text = bool(config.is_encoder_decoder), _cached(config)
    own = ("num_decoder_layers", "decoder_layers") if both else ()
    layers = _one(text, *own, "num_hidden_layers", "num_layers") or 0
    layers -= getattr(text, "num_kv_shared_layers", None) or 0
    queries = _one(text, *(("decoder_attention_heads",) if both else ()), "num_attention_heads", "num_heads") or 1
    heads = _one(text, "num_key_value_heads", "num_kv_heads") or queries
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        heads = 1
    size = _one(text, "head_dim", "d_kv") or (_one(text, "hidden_size", "d_model") or 0) // queries
    return {"num_layers": layers, "num_kv_heads": heads, "head_dim": size}


def _check_shape(op: str, config: Any, prefix: Prefix) -> None:
    """Check layers, heads and head size against the model's cache."""
    text = _cached(config)
    uneven = [name for name in _UNEVEN if getattr(text, name, None) is not None]
    _checks.require(not uneven, op, "model", "cache keys and values of one size in every layer", uneven)
    others = [kind for kind in getattr(text, "layer_types", None) or [] if kind not in _ATTENDING]
    _checks.require(not others, op, "model", "have attention in every layer", others[:1])
    for name, want in prefix_sizes(config).items():
        got = getattr(prefix, name)
        _checks.require(want == got, op, "prefix", f"have {name} {want}, the model's", got)


def _join(model: Any, name: str, module: nn.Module, record: Inserted, freeze_base: bool) -> None:
    """Make ``module`` a part of ``model``, on its device and in its mode, and freeze what was there before."""
    module.to(model.get_input_embeddings().weight.device).train(model.training)
    if freeze_base:
        record.trained = {key: p.requires_grad for key, p in model.named_parameters(remove_duplicate=False)}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    model.add_module(name, module)


def _become(model: Any, kind: Any, record: Inserted) -> None:
    setattr(model, RECORD, record)
    source: Any = type(model)
    model.__class__ = host(source, kind)
