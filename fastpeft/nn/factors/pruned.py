"""Pruning-aware factors: elements, or whole ranks, are set to zero for good as training goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastpeft.nn.config import Config, number
from fastpeft.nn.factors.masked import Masked
from fastpeft.ops import _checks

SCORES = ("magnitude", "gradient", "product")


def quantile(values: torch.Tensor, rate: float) -> torch.Tensor:
    """torch.quantile(values, rate), linear interpolation, for any number of elements and float dtype; fp32, 0-d."""
    flat = values.flatten().float()
    # torch computes the position in fp32, for as many elements as it takes.
    position = torch.tensor(rate, dtype=torch.float32 if flat.numel() <= 2**24 else torch.float64) * (flat.numel() - 1)
    below = int(position)
    low = flat.kthvalue(below + 1).values
    high = flat.kthvalue(min(below + 2, flat.numel())).values
    return low.lerp(high, float(position) - below)


class Pruned(Masked):
    """Mixin: ``prune()`` zeroes the elements of lora_A and lora_B that score least, and they stay zero.

    prune_rate the target of ``prune()`` without a rate, in [0, 1]
    schedule   rates, or a function of the step that gives one: a step is one ``prune()``, and the last rate stays
    score      "magnitude": |element| · "gradient": |element · gradient|, after a backward · "product": ‖A_k‖ ‖B_k‖ of a
               rank, which is pruned as a whole
    State      prune_step, the calls of ``prune()`` that took a rate of the schedule
    """

    OWN = ("prune_rate", "schedule", "score")
    SIZES = ("in_features", "out_features")
    POSITIONS = ("rank", "prune_rate", "schedule", "score")
    LAYOUT = "in_out"

    prune_step: torch.Tensor

    @classmethod
    def _configure(
        cls, in_features: int, out_features: int, options: dict[str, Any], layout: str, base: bool, *known: str
    ) -> tuple[Config, dict[str, Any]]:
        config, own = super()._configure(in_features, out_features, options, layout, base, *known)
        op, score, schedule = cls.__name__, own.get("score", "magnitude"), own.get("schedule")
        _checks.one_of(op, "score", score, SCORES)
        if isinstance(schedule, Sequence):
            _checks.require(len(schedule) > 0, op, "schedule", "hold at least one rate", "none")
            schedule = tuple(_rate(op, "schedule", each) for each in schedule)
        elif schedule is not None:
            rule = "be a sequence of rates or a function of the step"
            _checks.require_dtype(callable(schedule), op, "schedule", rule, type(schedule).__name__)
        rate = _rate(op, "prune_rate", own.get("prune_rate", 0.5))
        return config, {"prune_rate": rate, "schedule": schedule, "score": score}

    def _adapt(
        self,
        config: Config,
        device: torch.device | str | None,
        dtype: torch.dtype,
        prune_rate: float = 0.5,
        schedule: Sequence[float] | Callable[[int], float] | None = None,
        score: str = "magnitude",
    ) -> None:
        super()._adapt(config, device, dtype)
        self.prune_rate, self.schedule, self.score = prune_rate, schedule, score
        self.register_buffer("prune_step", torch.zeros((), dtype=torch.int64, device=device))

    def _reset(self, weight: torch.Tensor | None) -> None:
        super()._reset(weight)
        self.prune_step.zero_()
        device = self.lora_A.device
        sizes = (self.in_features, self.out_features)
        self._mask(*(torch.ones(self.rank, columns, dtype=torch.bool, device=device) for columns in sizes))

    @torch.no_grad()
    def prune(self, rate: float | None = None) -> float:
        """Zero what scores below the ``rate`` quantile over all elements of its factor; returns the ``sparsity``.

        rate       share of zeros in all, in [0, 1]; default: the schedule's next, else prune_rate. Masks only grow:
                   what is pruned stays so, and a second call with the same rate changes nothing
        Raises     ValueError: a rate out of range; score "gradient" before a backward. Nothing has been changed then.
        """
        scheduled = rate is None and self.schedule is not None
        if rate is None:
            rate = self.prune_rate if self.schedule is None else self._next()
        rate = _rate(self._op, "rate", rate)
        kept = self._kept()
        if self.score == "product":
            a, bt = self._plain()
            scores = a.float().norm(dim=1) * bt.float().norm(dim=1)
            stays = (scores >= quantile(scores, rate)).unsqueeze(1)
            grown = [each & stays for each in kept]
        else:
            grown = [each & (score >= quantile(score, rate)) for each, score in zip(kept, self._scores(), strict=True)]
        self._mask(*grown)
        if scheduled:
            self.prune_step += 1
        return self.sparsity

    def _scores(self) -> list[torch.Tensor]:
        """The scores of A [R, K] and of Bᵀ [R, N]."""
        if self.score == "magnitude":
            return [factor.abs().float() for factor in self._plain()]
        scores = []
        for name in ("lora_A", "lora_B"):
            parameter = getattr(self, name)
            rule = "have a gradient for score='gradient': call prune() after backward()"
            _checks.require(parameter.grad is not None, self._op, name, rule, None)
            score = (parameter * parameter.grad).abs().float()
            scores.append(score.t() if (name == "lora_A") == self._transposed else score)
        return scores

    def _next(self) -> float:
        step = int(self.prune_step)
        if callable(self.schedule):
            return self.schedule(step)
        assert self.schedule is not None
        return self.schedule[min(step, len(self.schedule) - 1)]

    def _describe(self) -> str:
        return f"prune_rate={self.prune_rate:g}, score={self.score}, {super()._describe()}"


def _rate(op: str, name: str, value: object) -> float:
    rate = number(op, name, value)
    _checks.require(0.0 <= rate <= 1.0, op, name, "be in [0, 1]", rate)
    return rate
