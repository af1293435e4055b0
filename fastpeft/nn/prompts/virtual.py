"""Virtual tokens: the common base of prompts and prefixes."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.nn.config import one_of, refuse_unknown, size
from fastpeft.ops import _checks

_Self = TypeVar("_Self", bound="VirtualTokens")


# The spellings of one option, ours and PEFT's.
SPELLINGS = (
    ("num_virtual_tokens", "prefix_length"),
    ("token_dim", "embedding_dimension", "embedding_dim"),
    ("hidden_size", "hidden_dimension", "hidden_dim", "encoder_hidden_size"),
    ("projection_dim", "encoder_hidden_size"),
    ("num_layers", "encoder_num_layers"),
    ("num_kv_heads", "num_heads", "num_key_value_heads"),
    ("head_dim", "head_dimension"),
    ("dropout", "dropout_probability", "encoder_dropout"),
)


def spelled(op: str, options: dict[str, Any], known: tuple[str, ...] = (), **given: Any) -> list[Any]:
    """The values of ``given``, in its order, each from its name or from another spelling of it in ``options``.

    known      the constructor's options that are spelled in one way
    Raises     ValueError: an option under two names.  TypeError: an unknown option
    """
    groups = [next(group for group in SPELLINGS if name in group) for name in given]
    refuse_unknown(op, options, (*known, *(name for group in groups for name in group)))
    values = []
    for (name, value), group in zip(given.items(), groups, strict=True):
        others = {other: options.get(other) for other in group if other != name}
        values.append(one_of(op, **{name: value}, **others))
    return values


class VirtualTokens(nn.Module):
    """A table [P, width] of virtual tokens, which an encoder may compute; the base class of prompts and prefixes.

    All rows of a batch see the same table. So the encoder runs once a call, on P rows and never on B · P; its output
    is expanded, which copies nothing. Dropout comes after the expansion: every sample has its own mask.

    ``dropout_probability`` is read at every call and may be set. ``enable()`` and ``disable()`` say whether an inserted
    prompt or prefix takes part in the model's forward.
    """

    num_virtual_tokens: int
    width: int
    embedding: nn.Embedding

    def __init__(self, num_virtual_tokens: int, width: int, dropout: float) -> None:
        super().__init__()
        self.num_virtual_tokens, self.width = num_virtual_tokens, width
        self.dropout_probability = float(dropout)
        self._enabled, self._baked = True, False

    @property
    def _op(self) -> str:
        return type(self).__name__

    def _encode(self) -> torch.Tensor:
        """The table [P, width], differentiable, before dropout."""
        return self.embedding.weight

    def encode(self) -> torch.Tensor:
        """The table [P, width]: one run of the encoder, without dropout; in the dtype that the encoder computes in."""
        return self.embedding.weight if self._baked else self._encode()

    def forward(self, batch_size: int | torch.Tensor = 1, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The virtual tokens of a batch.

        batch_size    B; or indices [..., P] of any integer dtype, as nn.Embedding takes them: which token stands
                      where. The encoder runs once in either case
        dtype         of the result; default: the encoder's. The table is cast, not its B copies
        Returns       [B, P, width], or [..., P, width]; without dropout the rows of a batch share their memory
        Raises        TypeError: neither.  ValueError: B < 0.  IndexError: an index that is out of range
        """
        table = self.encode() if dtype is None else self.encode().to(dtype)
        if isinstance(batch_size, torch.Tensor):
            integral = not (batch_size.is_floating_point() or batch_size.is_complex() or batch_size.dtype == torch.bool)
            rule = "be a batch size or indices of the virtual tokens"
            _checks.require_dtype(integral, self._op, "batch_size", rule, batch_size.dtype)
            _checks.require(batch_size.dim() >= 1, self._op, "batch_size", rule, "a 0-d tensor")
            rows = F.embedding(batch_size.to(torch.int64), table)
        else:
            rows = table.expand(size(self._op, "batch_size", batch_size, 0), *table.shape)
        return self._dropped(rows)

    def _dropped(self, rows: torch.Tensor) -> torch.Tensor:
        if self.training and self.dropout_probability > 0.0:
            return F.dropout(rows, self.dropout_probability)
        return rows

    @property
    def baked(self) -> bool:
        return self._baked

    @torch.no_grad()
    def bake(self: _Self) -> _Self:
        """Replace the encoder by its output: ``embedding.weight`` [P, width], nothing else.

        This works in place; PEFT's files hold the same table. Training can go on from it. Returns ``self``.
        """
        if list(self.state_dict()) == ["embedding.weight"] and self.embedding.weight.shape[1] == self.width:
            self._baked = True
        if not self._baked:
            self._become_plain(self.encode().detach().clone())
        return self

    def _become_plain(self, table: torch.Tensor) -> None:
        trained = any(parameter.requires_grad for parameter in self.parameters())
        self._parameters.clear()
        self._modules.clear()
        self.embedding = nn.Embedding(self.num_virtual_tokens, self.width, _weight=table)
        self.embedding.weight.requires_grad_(trained)
        self._baked = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A table alone, our baked one or the ``prompt_embeddings`` of PEFT's files, is loaded baked."""
        key, saved = prefix + "embedding.weight", prefix + "prompt_embeddings"
        if saved in state_dict and key not in state_dict:
            state_dict[key] = state_dict.pop(saved)
        table = state_dict.get(key)
        encoder = [prefix + name for name in self.state_dict() if name != "embedding.weight"]
        alone = not any(name in state_dict for name in encoder)
        if (
            not self._baked
            and encoder
            and alone
            and getattr(table, "shape", None)
            == (
                self.num_virtual_tokens,
                self.width,
            )
        ):
            self._become_plain(torch.empty_like(self.encode()))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def enabled(self) -> bool:
        return self._enabled

    def enable(self) -> None:
        """Let the inserted virtual tokens act again."""
        self._enabled = True

    def disable(self) -> None:
        """Leave them out of the model's every later forward; a cache that already holds them keeps them."""
        self._enabled = False

    def _describe(self) -> str:
        parts = [f"dropout={self.dropout_probability:g}" if self.dropout_probability else ""]
        parts += ["baked" if self._baked else "", "" if self._enabled else "disabled"]
        return ", ".join(part for part in parts if part)


class Prompt(VirtualTokens):
    """Virtual tokens as embeddings: rows [P, token_dim] that stand before those of the real tokens."""

    @property
    def token_dim(self) -> int:
        return self.width

    def extra_repr(self) -> str:
        text = f"num_virtual_tokens={self.num_virtual_tokens}, token_dim={self.width}"
        return ", ".join(part for part in (text, self._describe()) if part)
