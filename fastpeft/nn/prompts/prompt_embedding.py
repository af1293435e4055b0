"""Soft prompts: P trained embeddings before the real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastpeft.nn.config import adapter_dtype, size
from fastpeft.nn.prompts.virtual import Prompt, spelled
from fastpeft.ops import _checks

INITS = ("random", "vocab", "text")


class PromptEmbedding(Prompt):
    """P embeddings that are trained instead of the model                      Lester et al. 2021, arXiv:2104.08691

    num_virtual_tokens    P >= 1
    token_dim    width of the model's word embeddings; also ``embedding_dimension``, ``embedding_dim``
    init         "random": N(0, 1) · "vocab": the embeddings of P words drawn from the vocabulary, with repetition ·
                 "text": those of the tokens of ``text``, repeated or trimmed to P. The last two learn much faster
    text, tokenizer    for "text": a string, and what turns it into token ids: ``tokenizer(text)["input_ids"]``
    word_embeddings    for "vocab" and "text": ``model.get_input_embeddings()``, or its weight [V, token_dim]
    dropout      in [0, 1), on the output while training; also ``dropout_probability``
    device, dtype    default: the word embeddings' device, and at least fp32
    Output       (batch_size) -> [B, P, token_dim]; see ``forward``
    Raises       ValueError: a size, an unknown init, a missing argument of init, text without a token.
                 TypeError: a type, an unknown option
    """

    def __init__(
        self,
        num_virtual_tokens: int | None = None,
        token_dim: int | None = None,
        init: str = "random",
        *,
        text: str | None = None,
        tokenizer: Callable[[str], Any] | None = None,
        word_embeddings: nn.Module | torch.Tensor | None = None,
        dropout: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        op, known = self._op, ("init", "text", "tokenizer", "word_embeddings")
        P, d, dropout = spelled(
            op, options, known, num_virtual_tokens=num_virtual_tokens, token_dim=token_dim, dropout=dropout
        )
        P, d = size(op, "num_virtual_tokens", P), size(op, "token_dim", d)
        dropout = 0.0 if dropout is None else dropout
        _checks.probability(op, "dropout", dropout)
        _checks.one_of(op, "init", init, INITS)
        for name, value, needed in (
            ("text", text, init == "text"),
            ("tokenizer", tokenizer, init == "text"),
            ("word_embeddings", word_embeddings, init != "random"),
        ):
            _checks.require(value is not None or not needed, op, name, f"be given for init={init!r}", None)
        ids: torch.Tensor | None = None
        if init == "vocab":
            ids = torch.randint(0, _vocabulary(op, word_embeddings, d), (P,))
        elif init == "text":
            ids = text_ids(op, text, tokenizer, P, _vocabulary(op, word_embeddings, d))
        super().__init__(P, d, dropout)
        if ids is None:
            self.embedding = nn.Embedding(P, d, device=device, dtype=adapter_dtype(op, dtype))
        else:
            rows = _embedded(word_embeddings, ids)
            rows = rows.to(rows.device if device is None else device, adapter_dtype(op, dtype, rows), copy=True)
            self.embedding = nn.Embedding(P, d, _weight=rows)
        self.init = init

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, init={self.init}"


def _weight(word_embeddings: object) -> object:
    return getattr(word_embeddings, "weight", None) if isinstance(word_embeddings, nn.Module) else word_embeddings


def _vocabulary(op: str, word_embeddings: object, d: int) -> int:
    """V of a [V, d] table of word embeddings, which is checked."""
    weight = _weight(word_embeddings)
    rule = "be an embedding module or its weight"
    _checks.require_dtype(isinstance(weight, torch.Tensor), op, "word_embeddings", rule, type(word_embeddings).__name__)
    assert isinstance(weight, torch.Tensor)
    fits = weight.dim() == 2 and weight.shape[1] == d
    _checks.require(fits, op, "word_embeddings", f"have shape [V, token_dim] = [any, {d}]", list(weight.shape))
    return int(weight.shape[0])


@torch.no_grad()
def _embedded(word_embeddings: Any, ids: torch.Tensor) -> torch.Tensor:
    """The rows as the model sees them: a module may scale them."""
    ids = ids.to(_weight(word_embeddings).device)  # type: ignore[attr-defined]
    rows: torch.Tensor = word_embeddings(ids) if isinstance(word_embeddings, nn.Module) else word_embeddings[ids]
    return rows.detach()


def text_ids(op: str, text: object, tokenizer: Any, P: int, V: int) -> torch.Tensor:
    """The token ids of ``text``, special tokens included, repeated or trimmed to P."""
    _checks.require_dtype(isinstance(text, str), op, "text", "be a string", type(text).__name__)
    _checks.require_dtype(callable(tokenizer), op, "tokenizer", "be callable", type(tokenizer).__name__)
    encoded = tokenizer(text)
    ids = torch.as_tensor(encoded if isinstance(encoded, (list, tuple, torch.Tensor)) else encoded["input_ids"])
    ids = ids.flatten().cpu()
    _checks.require(ids.numel() >= 1, op, "text", "have at least one token", repr(text))
    ids = ids.to(torch.int64)
    inside = bool(((ids >= 0) & (ids < V)).all())
    _checks.require(inside, op, "tokenizer", f"give ids in [0, {V}), the vocabulary's", ids.tolist())
    return ids.repeat(-(-P // ids.numel()))[:P]
