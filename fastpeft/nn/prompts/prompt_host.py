"""A prompt in a model: P more tokens before those of the first call, which has no cache yet.

Filler ids stand for them, so that all code that reads ids (heads that look for padding, positions that count tokens)
sees P + T ids, and a hook of the embedding puts the prompt in their place. In an encoder-decoder that happens in the
encoder, which ``generate`` calls by itself; the decoder's mask of the encoder's output is lengthened.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from fastpeft.nn.prompts import prepend
from fastpeft.nn.prompts.hosts import (
    CACHE_POSITION,
    READY,
    RECORD,
    Host,
    Inserted,
    check_mask,
    check_room,
    length,
    lengthen,
    renamed,
    roomier,
    started,
    started_inputs,
    tokens,
)
from fastpeft.nn.prompts.virtual import Prompt
from fastpeft.ops import _checks

_INDEX_INPUTS = ("start_positions", "end_positions", "mc_token_ids")
_ONE_LABEL = ("SequenceClassification", "MultipleChoice", "NextSentence")
"""Models whose labels are not one a token, even where there are as many."""


class PromptHost(Host):
    METHODS: ClassVar[dict[str, str]] = {
        "forward": "_prompted",
        "prepare_inputs_for_generation": "_prepared",
        "_prepare_cache_for_generation": "_roomier",
    }

    def _prompted(self: Any, inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        record: Inserted = getattr(self, RECORD)
        prompt: Prompt = record.module
        ready = kwargs.pop(READY, False)
        shape = tokens(kwargs)
        if ready or not prompt.enabled or shape is None:
            return inner(**kwargs)
        cache, T = renamed(kwargs, record.cache_name), shape[-1]
        if held := length(record.op, cache):
            lengthen(record, kwargs, held - prompt.num_virtual_tokens + T)
            return inner(**kwargs)
        kwargs.pop(CACHE_POSITION, None)
        check_room(record, cache, T)
        rows = functools.partial(prompt, shape[:-1].numel())
        self._lengthen_all(record, kwargs, shape)
        if kwargs.get("input_ids") is None:
            embeddings = kwargs["inputs_embeds"]
            before = rows(embeddings.dtype).view(*shape[:-1], -1, embeddings.shape[-1]).to(embeddings.device)
            kwargs["inputs_embeds"] = torch.cat([before, embeddings], dim=-2)
            return inner(**kwargs)
        ids = kwargs["input_ids"]
        stand_ins = ids.new_full((*shape[:-1], prompt.num_virtual_tokens), record.filler)
        kwargs["input_ids"] = torch.cat([stand_ins, ids], dim=-1)
        record.rows.make = rows
        try:
            output = inner(**kwargs)
            used = record.rows.make is None
        finally:
            record.rows.make = None
        _checks.require(used, record.op, "model", "keep the embedding that it had; insert again", "another one")
        return output

    def _lengthen_all(self: Any, record: Inserted, kwargs: dict[str, Any], shape: torch.Size) -> None:
        """Lengthen every argument of one value a token, in the call that brings the prompt in."""
        P, T = record.module.num_virtual_tokens, shape[-1]
        mask = kwargs.get("attention_mask")
        if mask is not None and not (record.nested and mask.shape[-1] == P + T):
            kwargs["attention_mask"] = _prompt_mask(record, mask)
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = prepend.positions_left(positions, P, record.first)
        if (types := kwargs.get("token_type_ids")) is not None:
            kwargs["token_type_ids"] = torch.cat([types[..., :1].expand(*types.shape[:-1], P), types], dim=-1)
        if not any(task in type(self).__name__ for task in _ONE_LABEL):
            for key in ("labels", "shift_labels"):
                labels = kwargs.get(key)
                if labels is not None and labels.shape == shape and not labels.is_floating_point():
                    kwargs[key] = prepend.ignored_left(labels, P)
        for key in _INDEX_INPUTS:
            if kwargs.get(key) is not None:
                kwargs[key] = kwargs[key] + P

    def _prepared(self: Any, inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        record: Inserted = getattr(self, RECORD)
        if not record.module.enabled:
            return inner(**kwargs)
        if started(record.op, kwargs.get(record.cache_name), kwargs.get("is_first_iteration", True)):
            return started_inputs(record, inner, kwargs)
        mask = kwargs.get("attention_mask")
        inputs = inner(**kwargs)
        # A 4-D mask made for a static cache lacks the prompt.
        inputs["attention_mask"] = mask
        return inputs

    def _roomier(self: Any, inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        return roomier(self, inner, kwargs)


class CrossHost(Host):
    METHODS: ClassVar[dict[str, str]] = {"forward": "_crossed"}

    def _crossed(self: Any, inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        record: Inserted = getattr(self, RECORD)
        mask = kwargs.get("attention_mask")
        if record.module.enabled and mask is not None:
            check_mask(record, mask)
            one = mask.dim() == 2 or mask.shape[-2] == 1
            _checks.require(one, record.op, "attention_mask", "have one row for all queries", list(mask.shape))
            P = record.module.num_virtual_tokens
            kwargs["attention_mask"] = (
                prepend.ones_left(mask, P) if mask.dim() == 2 else prepend.prefix_columns(mask, P)
            )
        return inner(**kwargs)


def _prompt_mask(record: Inserted, mask: Any) -> torch.Tensor:
    check_mask(record, mask)
    if mask.dim() == 2:
        return prepend.ones_left(mask, record.module.num_virtual_tokens)
    known = record.causal is not None or mask.shape[-2] == 1
    _checks.require(known, record.op, "attention_mask", "be 2-D where no layer says is_causal", list(mask.shape))
    return prepend.prompt_rows_and_columns(mask, record.module.num_virtual_tokens, bool(record.causal))
