"""Factors whose rank can shrink: resizing for ``compact()``, and loading a compacted state dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpeft.nn.factors.base import LoRAModule


class Shrinking(LoRAModule):
    """Mixin: every tensor that has a rank dimension can lose ranks."""

    def _rank_dims(self) -> dict[str, int]:
        """The parameters and buffers that have a rank dimension, and which dimension it is."""
        return {"lora_A": int(self._transposed), "lora_B": 1 - int(self._transposed)}

    def _resize(self, rank: int, kept: torch.Tensor | None = None) -> None:
        """Resize to ``rank`` ranks: those of ``kept`` (indices), or ones without values."""
        for name, dim in self._rank_dims().items():
            held: dict[str, Any] = self._parameters if name in self._parameters else self._buffers
            old = held[name]
            shape = [*old.shape[:dim], rank, *old.shape[dim + 1 :]]
            new = old.new_empty(shape) if kept is None else old.detach().index_select(dim, kept).contiguous()
            held[name] = nn.Parameter(new, old.requires_grad) if name in self._parameters else new
        self.rank = rank

    def _fits(self, state_dict: dict[str, Any], prefix: str, rank: int) -> bool:
        """Whether the state dict has every such tensor, in this rank and in the module's other sizes."""
        for name, dim in self._rank_dims().items():
            value, old = state_dict.get(prefix + name), {**self._parameters, **self._buffers}[name]
            assert old is not None
            if not isinstance(value, torch.Tensor):
                return False
            if value.shape != torch.Size([*old.shape[:dim], rank, *old.shape[dim + 1 :]]):
                return False
        return rank >= 1

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        value = state_dict.get(prefix + "lora_A")
        if isinstance(value, torch.Tensor) and value.dim() == 2:
            rank = value.shape[int(self._transposed)]
            # The rank changes only if every such tensor is there and fits; else torch reports what does not.
            if rank != self.rank and self._fits(state_dict, prefix, rank):
                self._resize(rank)
        super()._load_from_state_dict(state_dict, prefix, *args)
