"""RankAllocator: AdaLoRA's budget of ranks, spread over the layers.             Zhang et al. 2023, arXiv:2303.10512"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastpeft.nn.config import named_options, number, size
from fastpeft.nn.factors.adaptive import Adaptive
from fastpeft.ops import _checks

_OP = "RankAllocator"


class RankAllocator:
    """Takes ranks out of AdaLoRA layers, least important first, until ``target_rank`` ranks a layer are left.

    Source         Zhang et al. 2023, arXiv:2303.10512, eq. 7 to 12
    model          a module with AdaLoRA layers in it, or such layers themselves
    target_rank    final ranks a layer, on average
    init_rank      initial ranks a layer; if given, it must be that of the layers
    tinit, tfinal  steps before the first change of the budget, and after the last
    delta_t        steps between two changes
    total_step     steps of the training
    beta1, beta2   decay of the sensitivity's and the uncertainty's moving averages, in (0, 1)
    Raises     ValueError: a range, or no AdaLoRA layer.  TypeError: a type.

    The schedule and the scores are those of PEFT's AdaLoRA: |p · dp| of each element, smoothed, times its uncertainty;
    a rank's score is that of its gain plus the means over the row of A and over the column of B. Call ``update(step)``
    after ``optimizer.step()`` and before ``zero_grad()``. Layers of equal shape are scored by one call, without a
    host sync.
    """

    @named_options
    def __init__(
        self,
        model: nn.Module | Iterable[nn.Module],
        target_rank: int = 8,
        init_rank: int | None = None,
        tinit: int = 0,
        tfinal: int = 0,
        delta_t: int = 1,
        total_step: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        named = model.named_modules() if isinstance(model, nn.Module) else ((str(i), m) for i, m in enumerate(model))
        # Sorted, so that ties between layers break in the same way on every machine.
        self.layers = dict(sorted((name, m) for name, m in named if isinstance(m, Adaptive)))
        _checks.require(bool(self.layers), _OP, "model", "hold AdaLoRA layers", "none")
        self.target_rank, self.total_step = size(_OP, "target_rank", target_rank), size(_OP, "total_step", total_step)
        self.tinit, self.tfinal = size(_OP, "tinit", tinit, 0), size(_OP, "tfinal", tfinal, 0)
        self.delta_t = size(_OP, "delta_t", delta_t)
        rule = f"be below total_step - tfinal = {self.total_step - self.tfinal}"
        _checks.require(tinit < self.total_step - tfinal, _OP, "tinit", rule, tinit)
        self.beta1, self.beta2 = number(_OP, "beta1", beta1), number(_OP, "beta2", beta2)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            _checks.require(0.0 < beta < 1.0, _OP, name, "be in (0, 1)", beta)
        ranks = {name: layer.rank for name, layer in self.layers.items()}
        for name, rank in ranks.items():
            _checks.require(init_rank in (None, rank), _OP, "init_rank", f"be the rank of {name!r}, {rank}", init_rank)
        self.init_budget = sum(ranks.values())
        self.target_budget = self.target_rank * len(ranks)
        rule = f"be at most the layers' mean rank, {self.init_budget / len(ranks):g}"
        _checks.require(self.target_budget <= self.init_budget, _OP, "target_rank", rule, target_rank)
        self._kept: dict[str, torch.Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the moving averages."""
        self._averages: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def budget(self, step: int) -> tuple[int, bool]:
        """How many ranks may act at ``step``, by a cubic decay, and whether they are chosen again then."""
        last = self.total_step - self.tfinal
        if step <= self.tinit:
            return self.init_budget, False
        if step > last:
            return self.target_budget, True
        left = 1 - (step - self.tinit) / (last - self.tinit)
        spare = (self.init_budget - self.target_budget) * left**3
        return int(spare + self.target_budget), step % self.delta_t == 0

    @torch.no_grad()
    def update(self, step: int) -> int:
        """Score the ranks by this step's gradients, and choose again if the schedule says so; returns the budget.

        Raises     ValueError: a parameter without a gradient; nothing has been changed then.
        """
        budget, due = self.budget(step)
        last = self.total_step - self.tfinal
        if step > last:
            self._apply()
            return budget
        if step < last:
            self._observe()
        if due or step == last:
            self._choose(budget)
            self._apply()
        if step == last:
            self.reset()
        return budget

    def _groups(self) -> dict[tuple[Any, ...], list[torch.Tensor]]:
        """The parameters by role, layout, shape, dtype and device, each group in the order of the layers."""
        groups: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        for layer in self.layers.values():
            for role, p in (("A", layer.lora_A), ("B", layer.lora_B), ("gain", layer.gains)):
                groups.setdefault((role, layer.layout, tuple(p.shape), p.dtype, p.device), []).append(p)
        return groups

    def _observe(self) -> None:
        for name, layer in self.layers.items():
            for p in (layer.lora_A, layer.lora_B, layer.gains):
                rule = "have gradients in update(): call it after backward() and before zero_grad()"
                _checks.require(p.grad is not None, _OP, f"layer {name!r}", rule, None)
        for key, parameters in self._groups().items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            now = torch.stack(torch._foreach_mul(parameters, gradients)).abs_()
            if key not in self._averages:
                self._averages[key] = torch.zeros_like(now), torch.zeros_like(now)
            sensitivity, uncertainty = self._averages[key]
            sensitivity.mul_(self.beta1).add_(now, alpha=1 - self.beta1)
            uncertainty.mul_(self.beta2).add_(now.sub_(sensitivity).abs_(), alpha=1 - self.beta2)

    def _scores(self) -> list[torch.Tensor]:
        """The score of every rank [R], layer by layer: from the gain, A's row and B's column."""
        scores: dict[str, list[torch.Tensor]] = {"A": [], "B": [], "gain": []}
        parts: dict[tuple[Any, ...], Any] = {}
        for key, parameters in self._groups().items():
            role, layout, shape, _, device = key
            averages = self._averages.get(key)
            value = averages[0] * averages[1] if averages else torch.zeros(len(parameters), *shape, device=device)
            if role != "gain":
                value = value.mean(2 if (role == "A") == (layout == "out_in") else 1)
            parts[key] = iter(value.flatten(1).float().unbind())
        for layer in self.layers.values():
            for role, p in (("A", layer.lora_A), ("B", layer.lora_B), ("gain", layer.gains)):
                scores[role].append(next(parts[role, layer.layout, tuple(p.shape), p.dtype, p.device]))
        return list(torch._foreach_add(scores["gain"], torch._foreach_add(scores["A"], scores["B"])))

    def _choose(self, budget: int) -> None:
        scores = self._scores()
        out = self.init_budget - budget
        everything = torch.cat([score.to(scores[0].device) for score in scores])
        # A rank that ties with the last one out goes with it.
        bar = torch.kthvalue(everything, out)[0] if out else everything.new_full((), -1.0)
        kept = (everything > bar).split([len(score) for score in scores])
        self._kept = dict(zip(self.layers, kept, strict=True))

    def _apply(self) -> None:
        if self._kept is None:
            return
        gains: list[torch.Tensor] = []
        factors: list[torch.Tensor] = []
        for name, layer in self.layers.items():
            kept = self._kept[name].to(layer.lora_A.device)
            if layer.form == "svd":
                gains.append(layer.gains)
                factors.append(kept.view(-1, 1).to(layer.gains.dtype))
            else:
                layer.keep_ranks(kept)
        if gains:  # what keep_ranks does, for all layers at once
            torch._foreach_mul_(gains, factors)

    def rank_pattern(self) -> dict[str, list[bool]]:
        """Which ranks of each layer act, {name: [R]}: the last choice, or all if none yet; waits for the device."""
        if self._kept is None:
            return {name: [True] * layer.rank for name, layer in self.layers.items()}
        return {name: kept.tolist() for name, kept in self._kept.items()}

    def orthogonality_loss(self) -> torch.Tensor:
        """The mean over all factors of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ (Frobenius), differentiable; eq. 4 of the paper.

        Factors of equal shape are one batched product. Add it to the loss, times 0.5 as in PEFT.
        """
        total: torch.Tensor | None = None
        for (role, layout, *_), factors in self._groups().items():
            if role == "gain":
                continue
            stacked = torch.stack(factors)
            rows = stacked if (role == "A") == (layout == "out_in") else stacked.transpose(1, 2)
            gram = rows @ rows.transpose(1, 2)
            eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
            norms = (gram - eye).flatten(1).norm(dim=1).sum()
            total = norms if total is None else total + norms.to(total.device)
        assert total is not None
        return total / (2 * len(self.layers))

    def state_dict(self) -> dict[str, Any]:
        """The moving averages and the last choice, to resume from a checkpoint."""
        averages = {key: [tensor.clone() for tensor in pair] for key, pair in self._averages.items()}
        kept = None if self._kept is None else {name: value.clone() for name, value in self._kept.items()}
        return {"averages": averages, "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises     ValueError: a state of other layers; nothing has been changed then.
        """
        kept, averages, known = state["kept"], state["averages"], self._groups()
        fits = kept is None or {n: v.numel() for n, v in kept.items()} == {n: m.rank for n, m in self.layers.items()}
        _checks.require(fits, _OP, "state", "be of the same layers", "others" if kept is None else sorted(kept))
        for key, pair in averages.items():
            shape = (len(known[key]), *known[key][0].shape) if key in known else None
            sound = all(tuple(tensor.shape) == shape for tensor in pair)
            _checks.require(sound, _OP, "state", "be of the same layers", key)
        self._kept = None if kept is None else {name: value.clone() for name, value in kept.items()}
        self._averages = {key: (pair[0].clone(), pair[1].clone()) for key, pair in averages.items()}
