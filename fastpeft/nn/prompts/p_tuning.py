"""P-tuning: soft prompts computed by a small network, which is trained instead of them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from fastpeft.nn.config import adapter_dtype, flag, size
from fastpeft.nn.prompts.virtual import Prompt, spelled
from fastpeft.ops import _checks


class PromptEncoder(Prompt):
    """prompt = MLP(E), or MLP(LSTM(E)), of P embeddings E                         Liu et al. 2021, arXiv:2103.10385

    num_virtual_tokens    P >= 1
    token_dim    width of the model's word embeddings; also ``embedding_dimension``, ``embedding_dim``
    encoder      "mlp": ``num_layers`` hidden layers of ``hidden_size`` with ReLU between · "lstm": a bidirectional LSTM
                 of ``num_layers`` layers over the P tokens, then one hidden layer of 2 · hidden_size
    hidden_size  default token_dim; also ``hidden_dimension``, ``encoder_hidden_size``
    num_layers   2; also ``encoder_num_layers``
    dropout      in [0, 1), on the expanded output while training, a separate mask for every sample (PEFT's acts between
                 the layers of the LSTM, which it therefore runs once for every sample)
    inference_mode    made as ``bake()`` leaves it: an embedding alone, to load a baked state dict into
    Output       (batch_size) -> [B, P, token_dim]; see ``forward``
    State        embedding.weight [P, token_dim], mlp_head.{0, 2, …}, lstm_head.…: PEFT's, whose state dicts load
    Raises       ValueError: a size, an unknown encoder.  TypeError: a type, an unknown option
    """

    def __init__(
        self,
        num_virtual_tokens: int | None = None,
        token_dim: int | None = None,
        encoder: str = "mlp",
        hidden_size: int | None = None,
        num_layers: int | None = None,
        dropout: float | None = None,
        *,
        inference_mode: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        op = self._op
        P, d, h, layers, dropout = spelled(
            op,
            options,
            ("encoder", "inference_mode"),
            num_virtual_tokens=num_virtual_tokens,
            token_dim=token_dim,
            hidden_size=hidden_size,
            num_layers=num_layers,
            dropout=dropout,
        )
        P, d = size(op, "num_virtual_tokens", P), size(op, "token_dim", d)
        h, layers = (
            size(op, "hidden_size", d if h is None else h),
            size(op, "num_layers", 2 if layers is None else layers),
        )
        dropout = 0.0 if dropout is None else dropout
        _checks.probability(op, "dropout", dropout)
        encoder = encoder.lower() if isinstance(encoder, str) else encoder
        _checks.one_of(op, "encoder", encoder, ("mlp", "lstm"))
        flag(op, "inference_mode", inference_mode)
        kind: dict[str, Any] = {"device": device, "dtype": adapter_dtype(op, dtype)}
        super().__init__(P, d, dropout)
        self.encoder, self.hidden_size, self.num_layers = encoder, h, layers
        self.embedding = nn.Embedding(P, d, **kind)
        self._baked = inference_mode
        if inference_mode:
            return
        if encoder == "lstm":
            self.lstm_head = nn.LSTM(d, h, layers, batch_first=True, bidirectional=True, **kind)
            sizes = [2 * h, 2 * h, d]
        else:
            sizes = [d, *[h] * layers, d]
        self.mlp_head = _mlp(sizes, kind)

    def _encode(self) -> torch.Tensor:
        rows = self.embedding.weight
        if self.encoder == "lstm":
            rows = self.lstm_head(rows.unsqueeze(0))[0].squeeze(0)
        encoded: torch.Tensor = self.mlp_head(rows)
        return encoded

    def extra_repr(self) -> str:
        own = f"encoder={self.encoder}, hidden_size={self.hidden_size}, num_layers={self.num_layers}"
        return super().extra_repr() if self._baked else f"{super().extra_repr()}, {own}"


class PTuningEmbedding(Prompt):
    """prompt = dropout(LayerNorm(W₂ relu(W₁ E + b₁) + b₂)) of P embeddings E      Liu et al. 2021, arXiv:2103.10385

    num_virtual_tokens     P >= 1
    embedding_dimension    d, the width of the model's word embeddings; also ``embedding_dim``, ``token_dim``
    hidden_dimension       rows of W₁; default d; also ``hidden_dim``, ``hidden_size``
    dropout_probability    in [0, 1), a separate mask for every sample while training; also ``dropout``
    inference_mode         made as ``bake()`` leaves it: an embedding alone
    Output     (batch_size) -> [B, P, d]; see ``forward``
    State      virtual_embeddings [P, d], mlp.{0, 2}, layer_norm; baked: embedding.weight [P, d]
    Raises     ValueError: a size.  TypeError: a type, an unknown option
    """

    def __init__(
        self,
        num_virtual_tokens: int | None = None,
        embedding_dimension: int | None = None,
        hidden_dimension: int | None = None,
        dropout_probability: float | None = None,
        *,
        inference_mode: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        op = self._op
        P, d, h, dropout = spelled(
            op,
            options,
            ("inference_mode",),
            num_virtual_tokens=num_virtual_tokens,
            embedding_dimension=embedding_dimension,
            hidden_dimension=hidden_dimension,
            dropout_probability=dropout_probability,
        )
        P, d = size(op, "num_virtual_tokens", P), size(op, "embedding_dimension", d)
        h, dropout = size(op, "hidden_dimension", d if h is None else h), 0.0 if dropout is None else dropout
        _checks.probability(op, "dropout_probability", dropout)
        flag(op, "inference_mode", inference_mode)
        kind: dict[str, Any] = {"device": device, "dtype": adapter_dtype(op, dtype)}
        super().__init__(P, d, dropout)
        self.hidden_dimension, self._baked = h, inference_mode
        if inference_mode:
            self.embedding = nn.Embedding(P, d, **kind)
            return
        self.virtual_embeddings = nn.Parameter(torch.empty(P, d, **kind))
        self.mlp = _mlp([d, h, d], kind)
        self.layer_norm = nn.LayerNorm(d, **kind)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the virtual embeddings anew, N(0, 1); ``mlp`` and ``layer_norm`` reset themselves."""
        nn.init.normal_(self.virtual_embeddings)

    def _encode(self) -> torch.Tensor:
        encoded: torch.Tensor = self.layer_norm(self.mlp(self.virtual_embeddings))
        return encoded

    def extra_repr(self) -> str:
        return super().extra_repr() if self._baked else f"{super().extra_repr()}, hidden={self.hidden_dimension}"


def _mlp(sizes: list[int], kind: dict[str, Any]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, **kind), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
