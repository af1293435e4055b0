"""Prefixes: trained keys and values before those of the real tokens, in every layer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.nn.config import adapter_dtype, flag, size
from fastpeft.nn.prompts.checkpointing import CACHE_NAMES
from fastpeft.nn.prompts.virtual import VirtualTokens, spelled
from fastpeft.ops import _checks


class Prefix(VirtualTokens):
    """The base class of prefixes: a table [P, layers · 2 · heads · size], key before value, as PEFT lays it out."""

    def __init__(self, P: int, layers: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__(P, layers * 2 * heads * head_dim, dropout)
        self.num_layers, self.num_heads, self.head_dim = layers, heads, head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_dimension(self) -> int:
        return self.head_dim

    @property
    def prefix_length(self) -> int:
        return self.num_virtual_tokens

    def states(self, batch_size: int = 1, dtype: torch.dtype | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of every layer, each [B, heads, P, head_dim]: views of one run of the encoder."""
        rows = self(batch_size, dtype)
        rows = rows.view(*rows.shape[:2], self.num_layers, 2, self.num_heads, self.head_dim)
        return [(kv[0], kv[1]) for kv in rows.permute(2, 3, 0, 4, 1, 5)]

    def get_prefix_states(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of one layer, each [P, heads, head_dim]; only what this layer needs is computed.

        Raises     ValueError: a layer outside [0, num_layers).  TypeError: not an integer
        """
        layer = size(self._op, "layer", layer, 0)
        _checks.require(layer < self.num_layers, self._op, "layer", f"be in [0, {self.num_layers})", layer)
        start = layer * (self.width // self.num_layers)
        columns = slice(start, start + self.width // self.num_layers)
        rows = self.embedding.weight[:, columns] if self._baked else self._encode_columns(layer, columns)
        key, value = self._dropped(rows).view(-1, 2, self.num_heads, self.head_dim).unbind(1)
        return key, value

    def _encode_columns(self, layer: int, columns: slice) -> torch.Tensor:
        return self._encode()[:, columns]

    def past_key_values(self, batch_size: int = 1) -> Any:
        """transformers' DynamicCache that holds the prefix, for models that are called with one.

        This copies the prefix for every sample. ``insert_prefix`` does the same, with masks and positions to match.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(self.states(batch_size)):
            cache.update(key, value, layer)
        return cache

    @torch.no_grad()
    def copy_past_key_values(self, cache: Any) -> None:
        """Start from the keys and values of P real tokens: a prefix drawn at random disturbs a trained model.

        cache      an iterable of one (key, value, …) a layer, each [1, heads, P, head_dim]: the cache that a model
                   returned for these tokens
        Raises     ValueError: shapes, or a prefix that a network computes
        """
        layers = [(layer[0], layer[1]) for layer in cache]
        _checks.require(self._plain(), self._op, "prefix", "be parameters alone", "one that a projection computes")
        _checks.require(
            len(layers) == self.num_layers, self._op, "cache", f"have {self.num_layers} layers", len(layers)
        )
        shape = (1, self.num_heads, self.num_virtual_tokens, self.head_dim)
        for pair in layers:
            for states in pair:
                got = list(getattr(states, "shape", ()))
                rule = f"hold states of shape [1, heads, P, head_dim] = {list(shape)}"
                _checks.require(got == list(shape), self._op, "cache", rule, got)
        table = torch.stack([torch.stack(pair) for pair in layers]).squeeze(2)  # [L, 2, heads, P, head_dim]
        self._store(table.permute(3, 0, 1, 2, 4).reshape(self.num_virtual_tokens, self.width))

    @torch.no_grad()
    def copy_from_tokens(self, model: Any, input_ids: torch.Tensor) -> None:
        """Start from the keys and values of P real tokens, on which ``model`` runs alone, in eval mode and once.

        model      a transformers model that this prefix fits, before or after the insertion
        input_ids  [P] or [1, P], any integer dtype
        Raises     ValueError: another number of tokens, a model without such a cache, a prefix that a network computes
        """
        from transformers import DynamicCache

        P = self.num_virtual_tokens
        ids = torch.as_tensor(input_ids).reshape(1, -1).to(model.get_input_embeddings().weight.device)
        _checks.require(self._plain(), self._op, "prefix", "be parameters alone", "one that a projection computes")
        _checks.require(ids.shape[1] == P, self._op, "input_ids", f"have {P} tokens", list(ids.shape))
        # An encoder returns no cache, but its attentions fill one that is passed in.
        reads = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
        known = inspect.signature(type(reads).forward).parameters
        name = next((each for each in CACHE_NAMES[:2] if each in known), None)
        _checks.require(name is not None, self._op, "model", "take cached keys and values", type(model).__name__)
        assert name is not None
        cache, mode, enabled = DynamicCache(), model.training, self._enabled
        try:
            model.eval()
            self._enabled = False
            reads(ids, **{name: cache})
        finally:
            self._enabled = enabled
            model.train(mode)
        self.copy_past_key_values(cache)

    def _plain(self) -> bool:
        return True

    def _store(self, table: torch.Tensor) -> None:
        self.embedding.weight.copy_(table)

    def extra_repr(self) -> str:
        text = (
            f"num_virtual_tokens={self.num_virtual_tokens}, num_layers={self.num_layers}, "
            f"num_heads={self.num_heads}, head_dim={self.head_dim}"
        )
        return ", ".join(part for part in (text, self._describe()) if part)


class PrefixTuning(Prefix):
    """One trained matrix [P, 2 · heads · size] for every layer, its key half first   Li, Liang 2021, arXiv:2101.00190

    num_layers        layers of the model
    num_heads         its key/value heads, fewer than its query heads under grouped-query attention;
                      also ``num_kv_heads``
    head_dimension    size of a head; also ``head_dim``
    prefix_length     P >= 1; also ``num_virtual_tokens``
    dropout_probability    in [0, 1), a separate mask for every sample while training; also ``dropout``
    Output     get_prefix_states(layer) -> key, value, each [P, heads, size]; past_key_values(batch_size) -> Cache
    State      prefix_embeddings.{layer} [P, 2 · heads · size], N(0, 1); baked: embedding.weight
    Raises     ValueError: a size.  TypeError: a type, an unknown option
    """

    def __init__(
        self,
        num_layers: int | None = None,
        num_heads: int | None = None,
        head_dimension: int | None = None,
        prefix_length: int | None = None,
        dropout_probability: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        op = self._op
        H, hd, P, dropout = spelled(
            op,
            options,
            ("num_layers",),
            num_heads=num_heads,
            head_dimension=head_dimension,
            prefix_length=prefix_length,
            dropout_probability=dropout_probability,
        )
        L, H = size(op, "num_layers", num_layers), size(op, "num_heads", H)
        hd, P = size(op, "head_dimension", hd), size(op, "prefix_length", P)
        dropout = 0.0 if dropout is None else dropout
        _checks.probability(op, "dropout_probability", dropout)
        kind: dict[str, Any] = {"device": device, "dtype": adapter_dtype(op, dtype)}
        super().__init__(P, L, H, hd, dropout)
        self.prefix_embeddings = nn.ParameterList(torch.empty(P, 2 * H * hd, **kind) for _ in range(L))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every layer anew, N(0, 1)."""
        for parameter in self.prefix_embeddings:
            nn.init.normal_(parameter)

    def _encode(self) -> torch.Tensor:
        return torch.cat(list(self.prefix_embeddings), dim=1)

    def _encode_columns(self, layer: int, columns: slice) -> torch.Tensor:
        rows: torch.Tensor = self.prefix_embeddings[layer]
        return rows

    def _store(self, table: torch.Tensor) -> None:
        if self._baked:
            super()._store(table)
            return
        for parameter, columns in zip(self.prefix_embeddings, table.chunk(self.num_layers, 1), strict=True):
            parameter.copy_(columns)


class PrefixEncoder(Prefix):
    """A table [P, layers · 2 · heads · size], trained itself or as W₂ tanh(W₁ E + b₁) + b₂ of P embeddings E

    Without a projection this is p-tuning v2 (Liu et al. 2022, arXiv:2110.07602), with one the prefix tuning of
    Li, Liang 2021, arXiv:2101.00190.

    num_virtual_tokens    P >= 1; also ``prefix_length``
    num_layers      layers of the model
    num_kv_heads    its key/value heads; also ``num_heads``
    head_dim        size of a head; also ``head_dimension``
    projection_dim  rows of W₁; None trains the table itself; also ``encoder_hidden_size``
    token_dim       width of E; default heads · size, as in PEFT
    dropout         in [0, 1), a separate mask for every sample while training; also ``dropout_probability``
    inference_mode  made as ``bake()`` leaves it: the table alone, to load a baked state dict into
    Output     (batch_size) -> [B, P, layers · 2 · heads · size]; past_key_values(batch_size) -> Cache;
               get_prefix_states(layer) -> key, value, each [P, heads, size]
    State      embedding.weight; transform.{0, 2} with a projection: PEFT's, whose state dicts load
    Raises     ValueError: a size.  TypeError: a type, an unknown option
    """

    def __init__(
        self,
        num_virtual_tokens: int | None = None,
        num_layers: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        projection_dim: int | None = None,
        *,
        token_dim: int | None = None,
        dropout: float | None = None,
        inference_mode: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        op = self._op
        P, H, hd, h, dropout = spelled(
            op,
            options,
            ("num_layers", "token_dim", "inference_mode"),
            num_virtual_tokens=num_virtual_tokens,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            projection_dim=projection_dim,
            dropout=dropout,
        )
        P, L = size(op, "num_virtual_tokens", P), size(op, "num_layers", num_layers)
        H, hd = size(op, "num_kv_heads", H), size(op, "head_dim", hd)
        h = None if h is None else size(op, "projection_dim", h)
        d = H * hd if token_dim is None else size(op, "token_dim", token_dim)
        dropout = 0.0 if dropout is None else dropout
        _checks.probability(op, "dropout", dropout)
        flag(op, "inference_mode", inference_mode)
        kind: dict[str, Any] = {"device": device, "dtype": adapter_dtype(op, dtype)}
        super().__init__(P, L, H, hd, dropout)
        self.projection_dim, self._baked = h, inference_mode
        if h is None or inference_mode:
            self.embedding = nn.Embedding(P, self.width, **kind)
        else:
            self.embedding = nn.Embedding(P, d, **kind)
            self.transform = nn.Sequential(nn.Linear(d, h, **kind), nn.Tanh(), nn.Linear(h, self.width, **kind))

    def _plain(self) -> bool:
        return self._baked or self.projection_dim is None

    def _encode(self) -> torch.Tensor:
        rows: torch.Tensor = self.embedding.weight
        return rows if self._plain() else self.transform(rows)

    def _encode_columns(self, layer: int, columns: slice) -> torch.Tensor:
        if self._plain():
            return self.embedding.weight[:, columns]
        last: Any = self.transform[2]
        hidden = self.transform[1](self.transform[0](self.embedding.weight))
        return F.linear(hidden, last.weight[columns], last.bias[columns])

    def extra_repr(self) -> str:
        own = "" if self._plain() else f", projection_dim={self.projection_dim}"
        return super().extra_repr() + own
