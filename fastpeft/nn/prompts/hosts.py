"""How an inserted prompt or prefix acts: the model's class is changed in place to a subclass made at run time.

``prompt_host`` and ``prefix_host`` define the subclasses; this file has what they share. After its first call a cache
holds P entries more than the caller counts, so masks and positions of later calls are lengthened. In ``generate`` that
happens when the inputs are prepared, before 4-D masks are made of them: the forward of a decoding step has nothing
left to do, and can be compiled.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.nn.prompts import prepend
from fastpeft.nn.prompts.checkpointing import CACHE_NAMES
from fastpeft.ops import _checks

RECORD = "_fastpeft_virtual_tokens"
READY = "_fastpeft_prepared"
CACHE_POSITION = "cache_position"
"""Where the tokens of a call go in the cache: an argument of older transformers' forwards."""


class Rows:
    """A forward hook of the word embeddings: it replaces the first P rows by the prompt, once each time it is set."""

    def __init__(self) -> None:
        self.make: Callable[[torch.dtype], torch.Tensor] | None = None

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if self.make is None:
            return None
        rows = self.make(output.dtype).to(output.device)
        self.make = None
        return torch.cat([rows, output[..., rows.shape[-2] :, :]], dim=-2)


@dataclass
class Inserted:
    """The record of an insertion, kept on the model.

    filler     the id that stands for a virtual token        first    the position of the model's first token
    causal     whether its attention is; None: unknown        nested    the encoder of a larger model
    most       rows of its table of positions; None: it has none
    decoder    what a decoder's mask and positions are called by: "decoder_" in an encoder-decoder
    trained    which parameters required gradients before the base was frozen; None: it was not
    """

    op: str
    module: Any
    rows: Rows = field(default_factory=Rows)
    filler: int = 0
    first: int = 0
    causal: bool | None = None
    nested: bool = False
    most: int | None = None
    cache_name: str = CACHE_NAMES[0]
    decoder: str = ""
    trained: dict[str, bool] | None = None


def _entries(op: str, cache: Any) -> Any:
    """How many entries a cache holds: a tensor on the device if a static cache counts there."""
    linear = getattr(cache, "is_linear", None)
    rule = "hold keys and values; a recurrent model generates with use_cache=False"
    _checks.require(not (linear and all(linear)), op, "cache", rule, type(cache).__name__)
    return cache.get_seq_length()


def length(op: str, cache: Any) -> int:
    """How many entries a cache holds; waits for the device if it counts there."""
    return 0 if cache is None else int(_entries(op, cache))


def started(op: str, cache: Any, first: bool) -> bool:
    """Whether virtual tokens are in the cache already; ``first``: it may be the first call of a generation."""
    if cache is None:
        return False
    entries = _entries(op, cache)
    return (not first or int(entries) > 0) if isinstance(entries, torch.Tensor) else entries > 0


def tokens(kwargs: dict[str, Any], prefix: str = "") -> torch.Size | None:
    """The shape [..., T] of the ids or embeddings of a call."""
    ids, embeddings = kwargs.get(f"{prefix}input_ids"), kwargs.get(f"{prefix}inputs_embeds")
    return ids.shape if ids is not None else None if embeddings is None else embeddings.shape[:-1]


def check_room(record: Inserted, cache: Any, T: int) -> None:
    """Check that the table of positions and a static cache have room for the virtual tokens too."""
    op, needed = record.op, record.module.num_virtual_tokens + T
    fits = record.most is None or needed <= record.most
    rule = f"have at most {(record.most or 0) - needed + T} tokens beside the virtual ones, for {record.most} positions"
    _checks.require(fits, op, "input_ids", rule, T)
    cache = getattr(cache, "self_attention_cache", cache)
    ask = getattr(cache, "get_max_length", None) or getattr(cache, "get_max_cache_shape", None)
    # A sliding-window layer holds any length, and a growing one reports -1.
    most = -1 if ask is None or any(getattr(cache, "is_sliding", [])) else ask()
    full = most is not None and 0 < most < needed
    _checks.require(not full, op, "cache", f"have room for {needed} entries, the virtual tokens included", most)


def lengthen(record: Inserted, kwargs: dict[str, Any], seen: int | None) -> None:
    """Lengthen mask and positions of a call whose cache holds the virtual tokens.

    seen       real tokens, those of this call included; None: a caller's mask of any length
    """
    P, name = record.module.num_virtual_tokens, record.decoder + "attention_mask"
    mask = kwargs.get(name)
    if isinstance(mask, torch.Tensor) and (seen is None or mask.shape[-1] != seen + P):
        check_mask(record, mask)
        kwargs[name] = prepend.ones_left(mask, P) if mask.dim() == 2 else prepend.prefix_columns(mask, P)
    for name in (record.decoder + "position_ids", CACHE_POSITION):
        if kwargs.get(name) is not None:
            kwargs[name] = kwargs[name] + P


def check_mask(record: Inserted, mask: object) -> None:
    known = isinstance(mask, torch.Tensor) and mask.dim() in (2, 4)
    got = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    _checks.require(known, record.op, "attention_mask", "be None, [batch, tokens] or a 4-D tensor", got)


class Host:
    """The mixin of a changed class. ``_source``: the model's original class."""

    METHODS: ClassVar[dict[str, str]] = {}
    """A method of the model -> ours, which gets that of ``_source``, bound, and the arguments by name."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """As any module, but rebuilt from its original class: the subclass has no name by which to find it."""
        reduced = nn.Module.__reduce_ex__(self, max(protocol, 2))
        return _remake, (type(self)._source, type(self)._kind), *reduced[2:]


def _remake(source: Any, kind: Any) -> Any:
    made = host(source, kind)
    return made.__new__(made)


@functools.cache
def host(source: Any, kind: Any) -> Any:
    """The subclass of ``source`` that acts as ``kind``; its methods have the signatures of ``source``'s."""
    space: dict[str, Any] = {"__module__": source.__module__, "__qualname__": source.__qualname__}
    space |= {"_source": source, "_kind": kind}
    for name, ours in kind.METHODS.items():
        inner = getattr(source, name, None)
        if inner is not None:
            space[name] = _method(inner, ours)
    return type(source.__name__, (kind, source), space)


def _method(inner: Callable[..., Any], ours: str) -> Callable[..., Any]:
    names = tuple(inspect.signature(inner).parameters)[1:]

    @functools.wraps(inner)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        return getattr(self, ours)(functools.partial(inner, self), kwargs)

    return method


def renamed(kwargs: dict[str, Any], name: str) -> Any:
    """Move the cache of a call to the name that the model's forward has for it, and return it."""
    for other in CACHE_NAMES[:2]:
        if other != name and kwargs.get(other) is not None:
            kwargs[name] = kwargs.pop(other)
    return kwargs.get(name)


def roomier(model: Any, inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Enlarge a cache of fixed size by the virtual tokens."""
    record: Inserted = getattr(model, RECORD)
    if record.module.enabled and "max_cache_length" in kwargs:
        kwargs["max_cache_length"] += record.module.num_virtual_tokens
    return inner(**kwargs)


def started_inputs(record: Inserted, inner: Callable[..., Any], kwargs: dict[str, Any], counted: bool = True) -> Any:
    """The inputs of a decoding step, or of a text that continues a cache."""
    position = kwargs.pop(CACHE_POSITION, None)
    lengthen(record, kwargs, None)
    if counted and kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is not None:
        # Counted from the cache's length, which includes the virtual tokens.
        kwargs["next_sequence_length"] += record.module.num_virtual_tokens
    if position is None:
        inputs = inner(**kwargs)
    else:
        # ``inner`` also slices the caller's ids by position, so it is moved afterwards; forward makes the 4-D mask.
        inputs = inner(**kwargs, cache_position=position)
        inputs[CACHE_POSITION] = position + record.module.num_virtual_tokens
        inputs[record.decoder + "attention_mask"] = kwargs.get(record.decoder + "attention_mask")
    inputs[READY] = True
    return inputs
