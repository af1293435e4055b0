"""Masks, labels and positions for a sequence with P virtual tokens before it: all are P longer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fastpeft.nn.prompts.virtual import Prompt
from fastpeft.ops import _checks

IGNORED = -100
"""The label that torch's cross entropy leaves out."""


def ones_left(mask: torch.Tensor, P: int) -> torch.Tensor:
    """A mask [..., T], 1 where a token counts, with P ones before it."""
    return torch.cat([mask.new_ones(*mask.shape[:-1], P), mask], dim=-1)


def ignored_left(labels: torch.Tensor, P: int) -> torch.Tensor:
    return torch.cat([labels.new_full((*labels.shape[:-1], P), IGNORED), labels], dim=-1)


def positions_left(positions: torch.Tensor, P: int, first: int = 0) -> torch.Tensor:
    """Positions [..., T] moved up by P, with ``first`` … ``first`` + P - 1 before them."""
    before = torch.arange(first, first + P, device=positions.device, dtype=positions.dtype)
    return torch.cat([before.expand(*positions.shape[:-1], P), positions + P], dim=-1)


def _constant(mask: torch.Tensor, shape: tuple[int, ...], seen: bool) -> torch.Tensor:
    """An attention mask of one value: True or False; if additive, 0 or the dtype's lowest."""
    if mask.dtype == torch.bool:
        return mask.new_full(shape, seen)
    return mask.new_full(shape, 0.0 if seen else torch.finfo(mask.dtype).min)


def prefix_columns(mask: torch.Tensor, P: int) -> torch.Tensor:
    """An attention mask [..., queries, keys], bool or additive, with P keys before the others that every query sees."""
    return torch.cat([_constant(mask, (*mask.shape[:-1], P), True), mask], dim=-1)


def prompt_rows_and_columns(mask: torch.Tensor, P: int, causal: bool) -> torch.Tensor:
    """An attention mask [..., T, T], bool or additive, extended to P + T tokens: every token sees the prompt.

    In causal attention a row of the prompt sees the prompt up to itself; elsewhere the whole prompt and every token
    that some token sees, so that padding stays hidden. One row [..., 1, T] stands for all of them.
    """
    wide = prefix_columns(mask, P)
    if mask.shape[-2] == 1:
        return wide
    if causal:
        corner = _constant(mask, (*mask.shape[:-2], P, P), True)
        later = torch.ones(P, P, dtype=torch.bool, device=mask.device).triu(1)
        corner = torch.where(later, _constant(mask, (), False), corner)
        rows = torch.cat([corner, _constant(mask, (*mask.shape[:-2], P, mask.shape[-1]), False)], dim=-1)
    else:
        rows = wide.amax(dim=-2, keepdim=True).expand(*wide.shape[:-2], P, wide.shape[-1])
    return torch.cat([rows, wide], dim=-2)


class Prepended(NamedTuple):
    """A sequence with its prompt; None stays None."""

    embeddings: torch.Tensor
    attention_mask: torch.Tensor | None
    key_padding_mask: torch.Tensor | None
    labels: torch.Tensor | None
    position_ids: torch.Tensor | None


def _batch_first(op: str, model: nn.Module | None, batch_first: bool | None) -> bool:
    if batch_first is not None:
        _checks.require_dtype(
            isinstance(batch_first, bool), op, "batch_first", "be True or False", type(batch_first).__name__
        )
        return batch_first
    rule = "be given where the modules of model do not say it as one"
    _checks.require(model is not None, op, "batch_first", "be given, or the model that says it", None)
    _checks.require_dtype(isinstance(model, nn.Module), op, "model", "be an nn.Module", type(model).__name__)
    assert model is not None
    found = {held for module in model.modules() if isinstance(held := getattr(module, "batch_first", None), bool)}
    _checks.require(len(found) == 1, op, "batch_first", rule, f"{sorted(found)} there")
    return found.pop()


def prepend_prompt(
    prompt: Prompt,
    embeddings: torch.Tensor,
    *,
    model: nn.Module | None = None,
    batch_first: bool | None = None,
    attention_mask: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> Prepended:
    """Put a prompt before a batch of embeddings, and lengthen every tensor of one value a token to match.

    embeddings    [B, T, d], or [T, B, d] where batch_first is False, any float dtype, kept
    model, batch_first    which layout: the model's own ``batch_first`` (nn.TransformerEncoder's default is False, where
                  a prompt on dimension 1 would be further samples), or given here
    attention_mask      [B, T], 1 where a token counts: gets ones
    key_padding_mask    [B, T], True where a token is ignored, as torch's layers take it: gets False
    labels        [B, T] of one label a token: get -100, which cross entropy ignores
    position_ids  [B, T] or [1, T]: moved up by P, the prompt's 0 … P - 1 before them
    Returns       Prepended, a named tuple
    Raises        ValueError: no batch_first, several, or shapes.  TypeError: types
    """
    op = "prepend_prompt"
    _checks.require_dtype(isinstance(prompt, Prompt), op, "prompt", "be a prompt", type(prompt).__name__)
    _checks.tensor(op, "embeddings", embeddings)
    first = _batch_first(op, model, batch_first)
    fits = embeddings.dim() == 3 and embeddings.shape[2] == prompt.token_dim
    rule = f"have shape [batch, tokens, d] with d = {prompt.token_dim}, or [tokens, batch, d]"
    _checks.require(fits, op, "embeddings", rule, list(embeddings.shape))
    B, T = (int(embeddings.shape[i]) for i in ((0, 1) if first else (1, 0)))
    _per_token: dict[str, Any] = {"attention_mask": attention_mask, "key_padding_mask": key_padding_mask}
    for name, value in {**_per_token, "labels": labels, "position_ids": position_ids}.items():
        if value is None:
            continue
        _checks.tensor(op, name, value)
        rows = (1, B) if name == "position_ids" else (B,)
        ok = value.dim() == 2 and value.shape[1] == T and value.shape[0] in rows
        _checks.require(ok, op, name, f"have shape [batch, tokens] = [{B}, {T}]", list(value.shape))
        flag = name != "key_padding_mask" or value.dtype == torch.bool
        _checks.require_dtype(flag, op, name, "be a bool tensor", value.dtype)
    P, rows = prompt.num_virtual_tokens, prompt(B, embeddings.dtype)
    joined = torch.cat([rows, embeddings], 1) if first else torch.cat([rows.transpose(0, 1), embeddings], 0)
    return Prepended(
        joined,
        None if attention_mask is None else ones_left(attention_mask, P),
        None if key_padding_mask is None else ~ones_left(~key_padding_mask, P),
        None if labels is None else ignored_left(labels, P),
        None if position_ids is None else positions_left(position_ids, P),
    )
