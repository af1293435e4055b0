"""A prefix in a model: P keys and values a layer, in the cache of the first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from fastpeft.nn.prompts.checkpointing import CACHE_NAMES, checkpointed, seen_by
from fastpeft.nn.prompts.hosts import (
    READY,
    RECORD,
    Host,
    Inserted,
    check_room,
    length,
    lengthen,
    renamed,
    roomier,
    started,
    started_inputs,
)
from fastpeft.nn.prompts.prefix import Prefix


class PrefixHost(Host):
    METHODS: ClassVar[dict[str, str]] = {
        "forward": "_prefixed",
        "prepare_inputs_for_generation": "_prepared",
        "_prepare_cache_for_generation": "_roomier",
    }

    def _prefixed(self: Any, inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        record: Inserted = getattr(self, RECORD)
        prefix: Prefix = record.module
        if kwargs.pop(READY, False) or not prefix.enabled:
            return inner(**kwargs)
        cache, P, like = renamed(kwargs, record.cache_name), prefix.num_virtual_tokens, _like(record, kwargs)
        if like is None:
            return inner(**kwargs)
        B, T = like.shape[:2]
        if held := length(record.op, cache):
            lengthen(record, kwargs, held - P + T)
            return inner(**kwargs)
        check_room(record, cache, T)
        made, states = cache is None, self._states(prefix, B)
        cache = kwargs[record.cache_name] = _new_cache(self) if made else cache
        _fill(cache, states)
        if not record.decoder and not record.causal and kwargs.get("attention_mask") is None:
            # Without a mask an encoder makes one as long as its queries, but it must be as long as its keys.
            kwargs["attention_mask"] = torch.ones(B, T, dtype=torch.int64, device=like.device)
        self._count_embeddings(kwargs)
        lengthen(record, kwargs, T)
        attending = self.get_decoder() if record.decoder else self
        if blocks := checkpointed(attending):
            with seen_by(record.op, attending, blocks, states):
                output = inner(**kwargs)
        else:
            output = inner(**kwargs)
        if made and kwargs.get("use_cache") is False and hasattr(output, "items"):
            output = type(output)(**{name: value for name, value in output.items() if name not in CACHE_NAMES})
        return output

    def _states(self: Any, prefix: Prefix, B: int) -> Any:
        """The prefix's states in the model's compute dtype, on the device of its embeddings."""
        weight = self.get_input_embeddings().weight
        dtype = weight.dtype if weight.is_floating_point() else self.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        return prefix.states(B, dtype)

    def _count_embeddings(self: Any, kwargs: dict[str, Any]) -> None:
        """RoBERTa adds the cache's length to positions that it counts from ids, but not to those from embeddings."""
        if kwargs.get("inputs_embeds") is None or kwargs.get("position_ids") is not None:
            return
        for module in self.modules():
            count = getattr(module, "create_position_ids_from_inputs_embeds", None)
            if count is not None:
                kwargs["position_ids"] = count(kwargs["inputs_embeds"], module.padding_idx)

    def _prepared(self: Any, inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        record: Inserted = getattr(self, RECORD)
        cache = kwargs.get(record.cache_name)
        if not record.module.enabled or cache is None:
            return inner(**kwargs)
        begun = started(record.op, cache, kwargs.get("is_first_iteration", True))
        if not begun:
            given = kwargs.get("inputs_embeds") if kwargs.get("is_first_iteration") and not record.decoder else None
            _fill(cache, self._states(record.module, (kwargs["input_ids"] if given is None else given).shape[0]))
        return started_inputs(record, inner, kwargs, begun)

    def _roomier(self: Any, inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        return roomier(self, inner, kwargs)


def _like(record: Inserted, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """A tensor [B, T, …] of the tokens that attend to the prefix."""
    names = (f"{record.decoder}input_ids", f"{record.decoder}inputs_embeds", *(("labels",) if record.decoder else ()))
    return next((kwargs[name] for name in names if kwargs.get(name) is not None), None)


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    if model.config.is_encoder_decoder:
        # No config is passed: its number of layers may be the encoder's.
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _fill(cache: Any, states: Any) -> None:
    cache = getattr(cache, "self_attention_cache", cache)
    for layer, (key, value) in enumerate(states):
        cache.update(key, value, layer)
