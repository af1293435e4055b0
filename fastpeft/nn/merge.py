"""W + scale · B A in W's dtype, how much of the update its rounding loses, and the modules that can do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fastpeft.nn.factors.base import LoRAModule
from fastpeft.nn.init import needs_weight
from fastpeft.ops import _checks

# Rows of a slice: wide copies are made slice by slice, not of the whole weight.
_ROWS = 1024

_Self = TypeVar("_Self", bound="Mergeable")


@dataclass(frozen=True)
class MergeReport:
    """What rounding to the weight's dtype cost the update.

    max_abs_error               largest |stored - exact|, in the weight's unit
    relative_error_of_update    ‖stored - exact‖ / ‖update‖ (Frobenius): 0.3 means that 30 % of it was lost; 0 if none
    dtype                       of the stored weight; uint8 where that is packed
    """

    max_abs_error: float
    relative_error_of_update: float
    dtype: torch.dtype


@dataclass
class Undo:
    """What undoes a merge: the base as it was, or the factors that were added."""

    weight: Any
    bias: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    lora_bias: torch.Tensor | None
    scale: float
    had_bias: bool


def wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which the sum is exact compared with the rounding that is reported."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def added(
    op: str, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, MergeReport]:
    """weight [N, ...] + scale · b a, rounded once, and the report; ``weight`` is not written.

    a [R, K], b [N, R], any float dtype and strides, K the elements of weight[0], whatever their shape.
    Raises ValueError: a sum that is not finite in weight.dtype.
    """
    dtype = wide(weight.dtype)
    a = a.to(dtype)
    out = torch.empty_like(weight)
    worst = torch.zeros((), dtype=dtype, device=weight.device)
    lost, total = torch.zeros_like(worst), torch.zeros_like(worst)
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        update = ((b[rows].to(dtype) @ a) * scale).view(weight[rows].shape)
        exact = weight[rows].to(dtype) + update
        out[rows] = exact
        error = out[rows].to(dtype) - exact
        worst = torch.maximum(worst, error.abs().max())
        lost, total = lost + error.square().sum(), total + update.square().sum()
        finite = finite & out[rows].isfinite().all()
    _checks.require(bool(finite), op, "weight", f"stay finite in {weight.dtype} with the update", "inf or nan")
    relative = (lost / total).sqrt().item() if total else 0.0
    return out, MergeReport(worst.item(), relative, weight.dtype)


def added_bias(bias: torch.Tensor | None, lora_bias: torch.Tensor | None, scale: float) -> torch.Tensor | None:
    """bias + scale · lora_bias [N] in the dtype of bias; either may be missing."""
    if lora_bias is None:
        return bias
    update = lora_bias.to(wide(lora_bias.dtype)) * scale
    if bias is None:
        return update.to(lora_bias.dtype)
    return (bias.to(update.dtype) + update).to(bias.dtype)


@dataclass(frozen=True)
class Update:
    """scale · b a [N, K] and scale · bias [N], to be added to a base: a [R, K], b [N, R]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None


def stacked(updates: Sequence[Update], dtype: torch.dtype) -> Update:
    """The sum of ``updates`` as one update, exactly: their ranks side by side, their scales in b."""
    if len(updates) == 1:
        return updates[0]
    biases = [each.bias.to(dtype) * each.scale for each in updates if each.bias is not None]
    return Update(
        torch.cat([each.a.to(dtype) for each in updates]),
        torch.cat([each.b.to(dtype) * each.scale for each in updates], 1),
        1.0,
        sum(biases[1:], biases[0]) if biases else None,
    )


class Mergeable(LoRAModule):
    """A LoRA module over a base ``weight`` [N, ...] and ``bias`` [N] or None that its update can be added into."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _undo: Undo | None = None

    @property
    def merged(self) -> bool:
        return self._undo is not None

    @property
    def has_backup(self) -> bool:
        """Whether ``unmerge`` restores the base's exact bits."""
        return self._undo is not None and self._undo.weight is not None

    def _require_unmerged(self, doing: str) -> None:
        _checks.require(not self.merged, self._op, "state", f"be unmerged for {doing}()", "a merged module")

    def _require_merged(self, doing: str) -> None:
        _checks.require(self.merged, self._op, "state", f"be merged for {doing}()", "an unmerged module")

    def _require_plain(self, doing: str) -> None:
        """Require that the base is a Parameter of this module: a computed weight would overwrite a merge."""
        for name in ("weight", "bias"):
            rule = f"be a plain Parameter for {doing}()"
            computed = f"one that is computed at every call (a parametrization, weight_norm, prune) on {self._op}"
            _checks.require(name in self._parameters, self._op, name, rule, computed)

    def _require_resettable(self) -> None:
        self._require_unmerged("reset_parameters")
        if needs_weight(self.init):
            self._require_plain("reset_parameters")

    def merge(self, keep_backup: bool = True) -> MergeReport:
        """W ← W + scaling · B A and bias ← bias + scaling · lora_bias, in place, in the dtype of each.

        keep_backup    keep a second copy of W, so that ``unmerge`` restores its bits; else copies of A and B only
        Returns    what the rounding to W's dtype loses of the update: see MergeReport
        Raises     ValueError: merged already, disabled, a weight that torch computes (parametrizations, prune,
                   weight_norm), an update that is not one matrix, or a sum that overflows; nothing has been changed
                   then.

        Until ``unmerge`` the module is the plain layer: no dropout, and A and B get no gradient. ``train()``,
        ``disable()`` and ``load_state_dict`` unmerge first. A weight tied to another module changes there as well.
        """
        return self._merge((), keep_backup)

    def update_of(self, *condition: Any) -> Update:
        """The update that ``merge`` adds to the base; ``condition`` as forward takes it."""
        a, b = self._pair(*condition)
        return Update(a, b, float(self.scaling), self.lora_bias)

    @torch.no_grad()
    def _merge(self, condition: tuple[Any, ...], keep_backup: bool, more: Sequence[Update] = ()) -> MergeReport:
        """``merge`` with forward's arguments beside x, for factors whose update depends on them.

        more       other adapters' updates for the same base, with one rounding; this module's own only if it is enabled
        """
        self._require_unmerged("merge")
        _checks.require(self._enabled or bool(more), self._op, "state", "be enabled for merge()", "a disabled module")
        self._require_plain("merge")
        bias = self.bias
        own = [self.update_of(*condition)] if self._enabled else []
        update = stacked([*own, *more], wide(self._base_dtype()))
        a, b, scale, lora_bias = update.a, update.b, update.scale, update.bias
        merged, report = self._added(a, b, scale)
        if keep_backup:
            saved_bias = None if bias is None else bias.detach().clone()
            undo = Undo(self._backup(), saved_bias, None, None, None, scale, bias is not None)
        else:
            saved_bias = None if lora_bias is None else lora_bias.detach().clone()
            undo = Undo(None, None, a.detach().clone(), b.detach().clone(), saved_bias, scale, bias is not None)
        self._write(merged, added_bias(bias, lora_bias, scale))
        self._undo = undo
        return report

    @torch.no_grad()
    def unmerge(self) -> MergeReport:
        """Restore the base from before ``merge``: its exact bits from the backup, or W - scaling · B A rounded.

        Returns    the rounding of this step; no error if there was a backup
        Raises     ValueError: not merged.
        """
        self._require_merged("unmerge")
        self._require_plain("unmerge")
        undo = self._undo
        assert undo is not None
        if undo.weight is not None:
            weight, bias, report = undo.weight, undo.bias, MergeReport(0.0, 0.0, self.weight.dtype)
        else:
            assert undo.a is not None and undo.b is not None
            weight, report = self._added(undo.a, undo.b, -undo.scale)
            bias = added_bias(self.bias, undo.lora_bias, -undo.scale)
        self._write(weight, bias if undo.had_bias else None)
        self._undo = None
        return report

    def _added(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> tuple[Any, MergeReport]:
        """The base with scale · b a, in the form in which it is kept, and what that form loses of it."""
        return added(self._op, self.weight, a, b, scale)

    def _backup(self) -> Any:
        """A copy of the base in the form in which it is kept."""
        return self.weight.detach().clone()

    def _write_weight(self, weight: Any) -> None:
        self.weight.copy_(weight)

    def _base_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def _write(self, weight: Any, bias: torch.Tensor | None) -> None:
        """Write into the existing Parameters, so that optimizers, ties and version counters see the change."""
        self._write_weight(weight)
        if bias is None:
            self.bias = None
        elif self.bias is None:
            self.bias = nn.Parameter(bias.to(self._base_dtype()), requires_grad=False)
        elif bias is not self.bias:
            self.bias.copy_(bias)

    def to_linear(self) -> nn.Linear:
        """A new nn.Linear that computes what this module computes in eval mode, with its own copy of the weight."""
        return self._as_linear(self.weight.detach(), self.weight.dtype, self.weight.requires_grad)

    @torch.no_grad()
    def _as_linear(self, weight: torch.Tensor, dtype: torch.dtype, trained: bool) -> nn.Linear:
        """``weight`` [N, K] is the base as it is now, merged or not; it is copied."""
        bias = None if self.bias is None else self.bias.detach().to(torch.promote_types(self.bias.dtype, weight.dtype))
        if self._enabled and not self.merged:
            a, b = self._pair()
            scale = float(self.scaling)
            weight = added(self._op, weight, a, b, scale)[0]
            bias = added_bias(bias, self.lora_bias, scale)
        layer = nn.Linear(self.in_features, self.out_features, bias is not None, "meta")
        layer.weight = nn.Parameter(weight.to(dtype, copy=True), trained)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype, copy=True), trained)
        return layer.train(self.training)

    def disable(self) -> None:
        if self.merged:
            self.unmerge()
        super().disable()

    def train(self: _Self, mode: bool = True) -> _Self:
        if mode and self.merged:
            self.unmerge()
        return super().train(mode)

    def _apply(self: _Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)
        if self._undo is not None:
            for name, value in vars(self._undo).items():
                if isinstance(value, torch.Tensor):
                    setattr(self._undo, name, fn(value))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        undo = self._undo
        lossless = undo is None or undo.weight is not None
        rule = "be taken unmerged, or from a merge that kept its backup"
        _checks.require(lossless, self._op, "state_dict", rule, "merge(keep_backup=False)")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if undo is not None:
            destination[prefix + "weight"] = undo.weight
            # In place if it was there, so that the keys keep the unmerged module's order.
            if undo.had_bias:
                destination[prefix + "bias"] = undo.bias
            else:
                destination.pop(prefix + "bias", None)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.merged:
            self.unmerge()
        super()._load_from_state_dict(*args)
