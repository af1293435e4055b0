"""A prefix under transformers' gradient checkpointing, which hands its layers no cache.

transformers gives a checkpointed layer ``cache=None``, because a cache that grows would grow a second time when the
layer is recomputed. A prefix does not grow. So a self-attention without a cache gets its layer's prefix as a cache
that stores nothing: in the forward, and in the recomputation from the checkpoint's own closure. The states are then
those of that very step, whatever runs in between.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fastpeft.ops import _checks

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
_OTHER_KEYS = ("key_value_states", "encoder_hidden_states")
States = Sequence[tuple[torch.Tensor, torch.Tensor]]


class PrefixOnly:
    """The interface of a layer's cache, served by a prefix alone: ``update`` stores nothing."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = key, value

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self.key.to(key), key], dim=-2), torch.cat([self.value.to(value), value], dim=-2)

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return int(self.key.shape[-2])


class _Handed:
    """A forward pre-hook of one attention: it passes the prefix as the cache of a self-attention that has none."""

    def __init__(self, names: tuple[str, ...], cache_name: str, cache: PrefixOnly) -> None:
        self.names, self.cache_name, self.cache = names, cache_name, cache

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if any(given.get(name) is not None for name in (*_OTHER_KEYS, self.cache_name)):
            return None
        return (), {**given, self.cache_name: self.cache}


@functools.cache
def _names(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _hooks(model: nn.Module, states: States) -> list[tuple[nn.Module, _Handed]]:
    """The attentions of ``model`` that take a cache, and the hook that hands each its part of the prefix."""
    found = []
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            continue
        names = _names(type(module).forward)
        cache_name = next((name for name in CACHE_NAMES if name in names), None)
        if cache_name is not None and not any(hasattr(child, "layer_idx") for child in list(module.modules())[1:]):
            found.append((module, _Handed(names, cache_name, PrefixOnly(*states[layer]))))
    return found


@contextmanager
def _handed(hooks: list[tuple[nn.Module, _Handed]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


class _Recomputed:
    """A layer's checkpoint function; the layer sees the prefix in its first run and in the recomputation."""

    def __init__(self, checkpoint: Callable[..., Any], hooks: list[tuple[nn.Module, _Handed]]) -> None:
        self.checkpoint, self.hooks = checkpoint, hooks

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _handed(self.hooks):
                return function(*args, **kwargs)

        return self.checkpoint(run, *args, **kwargs)


def checkpointed(model: nn.Module) -> list[Any]:
    """The modules of ``model`` that checkpoint in this state."""
    if not model.training:
        return []
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


@contextmanager
def seen_by(op: str, model: nn.Module, blocks: list[Any], states: States) -> Iterator[None]:
    """Let the attentions of ``model`` see the prefix where ``blocks`` are checkpointed.

    Raises     ValueError: reentrant checkpointing, which gives no gradient to what a layer closes over
    """
    before = [(block, block.__dict__.get("_gradient_checkpointing_func")) for block in blocks]
    for _, function in before:
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", True)
        if function is not None and torch.is_grad_enabled():
            rule = "be gradient checkpointing with use_reentrant=False, so that the prefix has a gradient"
            _checks.require(reentrant is False, op, "checkpointing", rule, f"use_reentrant={reentrant}")
    hooks = _hooks(model, states)
    try:
        for block, function in before:
            if function is not None:
                inside = set(block.modules())
                own = [(module, hook) for module, hook in hooks if module in inside]
                block._gradient_checkpointing_func = _Recomputed(function, own)
        with _handed(hooks):
            yield
    finally:
        for block, function in before:
            if function is not None:
                block._gradient_checkpointing_func = function
