"""Prompts and prefixes in a model's sizes, inserted into a transformers model or held by the manager."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastpeft.nn.config import one_of
from fastpeft.nn.prompts import PrefixTuning, Prompt, PromptEmbedding, PTuningEmbedding, insert_prefix, insert_prompt
from fastpeft.nn.prompts.insertion import prefix_sizes
from fastpeft.nn.prompts.prompt_embedding import text_ids
from fastpeft.nn.prompts.virtual import SPELLINGS
from fastpeft.ops import _checks

_CLASSES: dict[str, type[nn.Module]] = {
    "ptuning": PTuningEmbedding,
    "prompt_tuning": PromptEmbedding,
    "prefix_tuning": PrefixTuning,
}
_LENGTH = 20


def is_transformers(model: Any) -> bool:
    """Whether a prompt can be inserted into this model."""
    return hasattr(model, "config") and hasattr(model, "get_input_embeddings") and hasattr(model, "base_model_prefix")


def _spelled(op: str, options: dict[str, Any], name: str) -> Any:
    """Take the value of an option out of ``options``, under any of its spellings."""
    names = next(group for group in SPELLINGS if name in group)
    return one_of(op, **{each: options.pop(each, None) for each in names})


def made(op: str, method: str, model: nn.Module, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The prompt or prefix, and the options that make another one of the same sizes.

    Raises     ValueError: a size that is neither given nor found in the model.
    """
    rest = dict(options)
    start = {name: rest.pop(name, None) for name in ("init", "text", "tokenizer")} if method == "prefix_tuning" else {}
    P = _spelled(op, rest, "num_virtual_tokens")
    given: dict[str, Any] = {"num_virtual_tokens": _LENGTH if P is None else P}
    if method == "prefix_tuning":
        names: tuple[str, ...] = ("num_layers", "num_kv_heads", "head_dim")
        asked = {name: _spelled(op, rest, name) for name in names}
        told = {} if None not in asked.values() else _prefix_sizes(model)
    else:
        names = ("token_dim",)
        asked = {"token_dim": _spelled(op, rest, "token_dim")}
        told = {} if None not in asked.values() else _width(model)
    for name in names:
        value = told.get(name) if asked[name] is None else asked[name]
        rule = "be given for a model without a config and without nn.MultiheadAttention layers of one size"
        _checks.require(value is not None, op, name, rule, None)
        given[name] = value
    if method == "prompt_tuning" and rest.get("init", "random") != "random" and is_transformers(model):
        rest.setdefault("word_embeddings", model.get_input_embeddings())  # type: ignore[operator]
    place = next(model.parameters(), None)
    if place is not None:
        rest.setdefault("device", place.device)
    module = _CLASSES[method](**given, **rest)
    if start:
        _start(op, model, module, **start)
    # Loaded values will replace those computed from the text.
    first = {"init", "text", "tokenizer", "word_embeddings", "device"}
    return module, given | {name: value for name, value in rest.items() if name not in first}


def _start(op: str, model: Any, prefix: Any, init: Any, text: Any, tokenizer: Any) -> None:
    """If requested, give a prefix the keys and values of a text's tokens, repeated or trimmed to its length."""
    _checks.one_of(op, "init", init, (None, "random", "text"))
    if init != "text":
        return
    _checks.require(is_transformers(model), op, "init", "be 'random' for a model that is not transformers'", init)
    for name, value in (("text", text), ("tokenizer", tokenizer)):
        _checks.require(value is not None, op, name, "be given for init='text'", None)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prefix.copy_from_tokens(model, text_ids(op, text, tokenizer, prefix.num_virtual_tokens, vocabulary))


def put_in(op: str, model: nn.Module, module: nn.Module) -> str:
    """Insert the prompt or prefix into a transformers model, else leave it to the manager; returns which place.

    Raises     ValueError, TypeError: as ``insert_prompt`` and ``insert_prefix``.
    """
    if not is_transformers(model):
        return "held"
    insert: Any = insert_prompt if isinstance(module, Prompt) else insert_prefix
    insert(model, module, freeze_base=False)
    return "inserted"


def _width(model: Any) -> dict[str, Any]:
    if is_transformers(model):
        site = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
        return {"token_dim": site.get_input_embeddings().weight.shape[1]}
    attentions = _attentions(model)
    widths = {attention.embed_dim for attention in attentions}
    return {"token_dim": widths.pop()} if len(widths) == 1 else {}


def _prefix_sizes(model: Any) -> dict[str, Any]:
    if is_transformers(model):
        return prefix_sizes(model.config)
    attentions = _attentions(model)
    heads = {(attention.num_heads, attention.head_dim) for attention in attentions}
    if len(heads) != 1:
        return {}
    num_heads, head_dim = heads.pop()
    return {"num_layers": len(attentions), "num_kv_heads": num_heads, "head_dim": head_dim}


def _attentions(model: nn.Module) -> list[Any]:
    """The self-attentions; the other attention of nn.TransformerDecoderLayer is named multihead_attn."""
    named = model.named_modules()
    return [m for name, m in named if isinstance(m, nn.MultiheadAttention) and not name.endswith("multihead_attn")]
