"""The classical baselines: a frozen body with a trained head, and a pattern with a verbaliser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.ops import _checks


def freeze_body(model: Any, head: str | Sequence[str] | None = None) -> list[str]:
    """Freeze ``model`` but for its head, whose parameters require gradients; the baseline that every method must beat.

    head       names of the modules that are the head: exact, or the last parts of a dotted name ("classifier"). None:
               all of a transformers model outside its ``base_model`` that is not tied to the body
    Returns    the names of the trained parameters
    Raises     ValueError: a name that matches nothing, or no head.  TypeError: not a module. Nothing is changed then
    """
    op = "freeze_body"
    _checks.require_dtype(isinstance(model, nn.Module), op, "model", "be an nn.Module", type(model).__name__)
    names = [head] if isinstance(head, str) else None if head is None else list(head)
    if names is None:
        body = getattr(model, "base_model", model)
        _checks.require(body is not model, op, "head", "be given where the model has no base_model beside it", None)
        inside = {id(parameter) for parameter in body.parameters()}
        trained = {id(parameter) for parameter in model.parameters()} - inside
    else:
        trained = set()
        for name in names:
            found = [module for full, module in model.named_modules() if full == name or full.endswith("." + name)]
            _checks.require(bool(found), op, "head", "name a module of the model", repr(name))
            trained |= {id(parameter) for module in found for parameter in module.parameters()}
    _checks.require(bool(trained), op, "head", "have parameters of its own", "none")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return [name for name, parameter in model.named_parameters() if id(parameter) in trained]


class PatternVerbalizer:
    """Classification as a cloze that the language model fills in: PET     Schick, Schütze 2021, arXiv:2001.07676, eq. 1

    s(l | x) = mean over the words v of l of M(v | P(x)), at the masked position; p = softmax over the labels l.

    tokenizer     a transformers tokenizer; with a ``mask_token`` the model is a masked language model, without one a
                  causal one, which predicts the word that would come after the pattern
    pattern       a format string with {mask} once and named fields: "{text} It was {mask}."; for a causal model {mask}
                  is its end. Or a function of one example that returns the finished text, the mask token in it
    verbalizer    label -> one word or several, each one token: {"negative": "bad", "positive": "good"}; tokenised with
                  the space before them that words have within a text, where that is one token
    Raises        ValueError: a pattern without its mask, an empty verbaliser, a word of several tokens.
                  TypeError: types
    """

    def __init__(
        self,
        tokenizer: Any,
        pattern: str | Callable[[Any], str],
        verbalizer: Mapping[Any, str | Sequence[str]],
    ) -> None:
        op = "PatternVerbalizer"
        _checks.require_dtype(callable(tokenizer), op, "tokenizer", "be callable", type(tokenizer).__name__)
        known = isinstance(pattern, str) or callable(pattern)
        _checks.require_dtype(known, op, "pattern", "be a string or a function", type(pattern).__name__)
        known = isinstance(verbalizer, Mapping)
        _checks.require_dtype(known, op, "verbalizer", "map labels to words", type(verbalizer).__name__)
        self.tokenizer, self.pattern = tokenizer, pattern
        self.mask_token: str | None = getattr(tokenizer, "mask_token", None)
        if isinstance(pattern, str):
            _checks.require(pattern.count("{mask}") == 1, op, "pattern", "have {mask} once", repr(pattern))
            ends = self.mask_token is not None or pattern.rstrip().endswith("{mask}")
            _checks.require(ends, op, "pattern", "end with {mask} where there is no mask token", repr(pattern))
        self.labels = list(verbalizer)
        _checks.require(len(self.labels) >= 2, op, "verbalizer", "have at least two labels", len(self.labels))
        self.token_ids = [self._words(op, words) for words in verbalizer.values()]

    def _words(self, op: str, words: str | Sequence[str]) -> list[int]:
        words, ids = [words] if isinstance(words, str) else list(words), []
        _checks.require(len(words) >= 1, op, "verbalizer", "have at least one word a label", words)
        for word in words:
            tried = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" " + word, word)]
            pieces = next((found for found in tried if len(found) == 1), tried[0])
            rule = f"have words of one token each, which {word!r} is not"
            _checks.require(len(pieces) == 1, op, "verbalizer", rule, f"{len(pieces)} tokens")
            ids.append(int(pieces[0]))
        return ids

    def text(self, example: Any) -> str:
        """One example in its pattern: a string for the field ``text``, or a mapping of the pattern's fields."""
        if callable(self.pattern):
            return self.pattern(example)
        fields = {"text": example} if isinstance(example, str) else dict(example)
        filled = self.pattern.format(**fields, mask=self.mask_token or "")
        return filled if self.mask_token is not None else filled.rstrip()

    def encode(self, examples: Sequence[Any], **options: Any) -> Any:
        """The model's inputs for a batch of examples: the tokenizer's, padded; ``options`` go to the tokenizer."""
        options = {"padding": True, "return_tensors": "pt", **options}
        return self.tokenizer([self.text(example) for example in examples], **options)

    def positions(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Where each example is answered [B]: at its mask token, or at its last token for a causal model.

        Raises     ValueError: an example without its mask, or with two
        """
        ids = inputs["input_ids"]
        if self.mask_token is not None:
            there = ids == self.tokenizer.mask_token_id
            counts = there.sum(-1)
            once, rule = bool((counts == 1).all()), "have the mask token once in every example"
            _checks.require(once, "PatternVerbalizer", "input_ids", rule, counts.tolist())
            return there.int().argmax(-1)
        mask = inputs.get("attention_mask")
        steps = torch.arange(ids.shape[1], device=ids.device)
        return (steps * (torch.ones_like(ids) if mask is None else mask)).argmax(-1)

    def scores(self, logits: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """s [B, labels] of the model's ``logits`` [B, T, V] for ``inputs``, differentiable.

        Logits may have more rows than ``inputs`` has tokens: the first are those of an inserted prompt. Or they are
        [B, V], for ``positions`` alone, which divides a large vocabulary's product by T.
        Raises     ValueError: an example without its mask, or with two
        """
        op, ids = "PatternVerbalizer", inputs["input_ids"]
        rows = logits
        if logits.dim() == 3:
            more = logits.shape[1] - ids.shape[1]
            _checks.require(more >= 0, op, "logits", f"have at least {ids.shape[1]} rows, one a token", logits.shape[1])
            position = self.positions(inputs).to(logits.device) + more
            rows = logits[torch.arange(ids.shape[0], device=logits.device), position]
        else:
            fits = logits.dim() == 2 and logits.shape[0] == ids.shape[0]
            _checks.require(fits, op, "logits", f"be [{ids.shape[0]}, T, V] or [{ids.shape[0]}, V]", list(logits.shape))
        return torch.stack([rows[:, ids].mean(-1) for ids in self.token_ids], dim=-1)

    def loss(self, logits: torch.Tensor, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy over the labels; ``labels`` [B] are indices into ``self.labels``."""
        return F.cross_entropy(self.scores(logits, inputs).float(), labels)

    def predict(self, logits: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> list[Any]:
        """The most likely label of each example."""
        return [self.labels[index] for index in self.scores(logits, inputs).argmax(-1).tolist()]
