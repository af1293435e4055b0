"""AdaLoRA's factors: a gain for each rank, and which ranks act.                    Zhang et al. 2023, arXiv:2303.10512

    A_k ← gain_k · A_k where rank k acts, else 0                                      ΔW = scaling · Σ_k gain_k B_k A_k

    form       gain             acts where
    "top_k"    importance       it is one of the ``current_rank`` largest, as ``update_rank(threshold)`` last counted
    "scores"   rank_importance  its score is over 0.1, or is the largest; the scores are the gains, or for
                                rank_allocation "importance" and "magnitude" what ``update_rank`` last measured
    "svd"      lora_E           everywhere; a gain that `RankAllocator` sets to zero takes its rank out

All of it is in parameter space and on the device: the product is that of ``lora_linear``, without a sync for scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpeft.nn.config import Config, flag, number, one_of, size
from fastpeft.nn.factors.ranks import Shrinking
from fastpeft.ops import _checks

FORMS = ("top_k", "scores", "svd")
ALLOCATIONS = ("uniform", "importance", "magnitude")
_GAINS = {"top_k": "importance", "scores": "rank_importance", "svd": "lora_E"}
# Options that select a form.
_TOP_K = {"max_rank", "min_rank"}
_SCORES = {"input_dimension", "input_dim", "rank", "adaptive_rank", "rank_allocation"}
_THRESHOLD = 0.1


class Adaptive(Shrinking):
    """Mixin: lora_A and lora_B with a gain for each rank, of which only some act.

    max_rank, min_rank    form "top_k": the initial rank, and the least that ``update_rank`` leaves
    rank, adaptive_rank, rank_allocation    form "scores"; adaptive_rank=False lets every rank act
    form            default: "scores" where one of its options is given, else "top_k"
    importance_grad False: the gain selects ranks and neither multiplies them nor is trained
    """

    OWN = ("form", "max_rank", "min_rank", "adaptive_rank", "rank_allocation", "importance_grad")
    SIZES = ("in_features", "out_features")
    POSITIONS = ("max_rank", "min_rank")
    RANKS = ("rank", "max_rank")

    form: str
    rank_mask: torch.Tensor
    rank_scores: torch.Tensor
    rank_threshold: torch.Tensor

    @classmethod
    def _convention(cls, options: dict[str, Any], positions: int) -> str | None:
        """Put the form into ``options``: that of the option names given; names of two forms are an error."""
        op, form = cls.__name__, options.get("form")
        _checks.one_of(op, "form", form, (None, *FORMS))
        given = {name for name, value in options.items() if value is not None}
        top_k, scores = sorted(given & _TOP_K), sorted(given & _SCORES)
        if form is None:
            form = "scores" if scores else "top_k"
            sizes = positions > 1 and "in_features" in given
            _checks.require(
                not scores or not (top_k or sizes), op, (scores or [""])[0],
                f"be left out beside {', '.join(top_k) or 'sizes by position'} (form 'top_k')", "both",
            )  # fmt: skip
        known = {"top_k": _TOP_K, "scores": _SCORES, "svd": {"rank"}}[form]
        foreign = sorted(given & (_TOP_K | _SCORES) - known - {"rank", "input_dimension"})
        _checks.require(not foreign, op, (foreign or [""])[0], f"be left out for form {form!r}", "given")
        options["form"] = form
        return "in_out" if form == "top_k" else "out_in"

    @classmethod
    def _configure(
        cls, in_features: int, out_features: int, options: dict[str, Any], layout: str, base: bool, *known: str
    ) -> tuple[Config, dict[str, Any]]:
        op, form = cls.__name__, options["form"]
        rank = one_of(op, rank=options.get("rank"), max_rank=options.pop("max_rank", None))
        options["rank"] = 16 if rank is None and form == "top_k" else rank
        if form == "svd":
            _checks.require(options.get("init") is None, op, "init", "be None for form='svd'", options.get("init"))
            if options.get("alpha") is None and options.get("scaling") is None:
                options["alpha"] = 16.0  # α/r in either layout
        config, own = super()._configure(in_features, out_features, options, layout, base, *known)
        own = {"adaptive_rank": True, "rank_allocation": "uniform", "importance_grad": True, **own}
        least = size(op, "min_rank", one_of(op, min(4, config.rank), min_rank=own.get("min_rank")))
        _checks.require(least <= config.rank, op, "min_rank", f"be at most the rank, {config.rank}", least)
        flag(op, "adaptive_rank", own["adaptive_rank"])
        flag(op, "importance_grad", own["importance_grad"])
        _checks.one_of(op, "rank_allocation", own["rank_allocation"], ALLOCATIONS)
        return config, own | {"min_rank": least}

    def _adapt(
        self,
        config: Config,
        device: torch.device | str | None,
        dtype: torch.dtype,
        form: str = "top_k",
        min_rank: int = 4,
        adaptive_rank: bool = True,
        rank_allocation: str = "uniform",
        importance_grad: bool = True,
    ) -> None:
        super()._adapt(config, device, dtype)
        self.form, self.min_rank, self.max_rank = form, min_rank, config.rank
        self.adaptive_rank, self.rank_allocation, self.importance_grad = adaptive_rank, rank_allocation, importance_grad
        shape = (config.rank, 1) if form == "svd" else (config.rank,)
        trained = importance_grad or form == "svd"
        self.register_parameter(_GAINS[form], nn.Parameter(torch.empty(shape, device=device, dtype=dtype), trained))
        if form != "svd":
            self.register_buffer("rank_mask", torch.empty(config.rank, dtype=torch.bool, device=device))
        if form == "top_k":
            # Under the public name, which a property reads as an int.
            self._buffers["current_rank"] = torch.empty((), dtype=torch.int64, device=device)
        if form == "scores":
            self.register_buffer("rank_threshold", torch.empty((), dtype=torch.float32, device=device))
        if form == "scores" and rank_allocation != "uniform":
            self.register_buffer("rank_scores", torch.empty(config.rank, dtype=dtype, device=device))

    @property
    def gains(self) -> torch.Tensor:
        """The gain of each rank: ``importance``, ``rank_importance`` or ``lora_E``."""
        value: torch.Tensor = getattr(self, _GAINS[self.form])
        return value

    @torch.no_grad()
    def _reset(self, weight: torch.Tensor | None) -> None:
        if self.form == "svd":
            for factor in (self.lora_A, self.lora_B):
                nn.init.normal_(factor, std=0.02)
            nn.init.zeros_(self.gains)
            if self.lora_bias is not None:
                nn.init.zeros_(self.lora_bias)
            return
        super()._reset(weight)
        nn.init.ones_(self.gains)
        self.rank_mask.fill_(True)
        self._count()
        if self.form == "scores":
            self.rank_threshold.fill_(_THRESHOLD)
        if "rank_scores" in self._buffers:
            self.rank_scores.fill_(1.0)

    def active(self) -> torch.Tensor:
        """Bool [R] on the device: the ranks that act in the next call."""
        if self.form == "svd":
            return (self.gains != 0).view(-1)
        if self.form == "top_k" or not self.adaptive_rank:
            return self.rank_mask
        scores = self._buffers.get("rank_scores")
        scores = self.gains.detach() if scores is None else scores
        # The largest score survives whatever the threshold; argmax gives the lowest index of a tie.
        ranks = torch.arange(scores.shape[0], device=scores.device)
        return ((scores > self.rank_threshold) | (ranks == scores.argmax())) & self.rank_mask

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = super().factors()
        if self.form == "svd":
            return a * self.gains, b
        active = self.active()
        gain = torch.where(active, self.gains, 0.0) if self.importance_grad else active.to(a.dtype)
        return a * gain.unsqueeze(1), b

    @property
    def current_rank(self) -> int:
        """How many ranks act; reading it waits for the device."""
        count = self._buffers.get("current_rank")
        return int(self.active().sum() if count is None else count)

    def get_effective_rank(self) -> int:
        """``current_rank``."""
        return self.current_rank

    @torch.no_grad()
    def update_rank(self, threshold: float = _THRESHOLD) -> int:
        """Choose again which ranks act, and return how many.

        threshold  "top_k": the largest ranks act, as many as have importance > threshold, from min_rank to max_rank; of
                   equal ones the lowest first. "scores": a rank acts if its score is over it; the scores "importance"
                   (|gain · gradient| and its mean over the rank's factors) and "magnitude" (|gain| · ‖A_k‖ · ‖B_k‖) are
                   measured now, relative to the largest
        Raises     ValueError: form "svd", whose ranks a `RankAllocator` chooses; "importance" before a backward pass.
        """
        _checks.require(self.form != "svd", self._op, "form", "be 'top_k' or 'scores' for update_rank()", self.form)
        if self.form == "top_k":
            order = self.gains.sort(descending=True, stable=True).indices
            count = (self.gains > threshold).sum().clamp(self.min_rank, self.max_rank)
            self.rank_mask[order] = torch.arange(self.rank, device=order.device) < count
        else:
            self.rank_threshold.fill_(number(self._op, "threshold", threshold))
            if self.rank_allocation == "magnitude":
                a, b = super().factors()
                scores = self.gains.abs() * a.norm(dim=1) * b.norm(dim=0)
                self._measured(scores)
            elif self.rank_allocation == "importance":
                self._measured(self._sensitivity())
        self._count()
        return self.current_rank

    def _measured(self, scores: torch.Tensor) -> None:
        most = scores.max()
        # Before the first step B is zero and so is every score: then all ranks count as equal.
        self.rank_scores.copy_(torch.where(most > 0, scores / most, torch.ones_like(scores)))

    def _sensitivity(self) -> torch.Tensor:
        """|p · dp| of the gain, and its mean over the row of A and the column of B: the paper's eq. 7 and 8."""
        rule = "have gradients for update_rank() with rank_allocation='importance': call it after backward()"
        parts = []
        for name in ("rank_importance", "lora_A", "lora_B"):
            parameter = getattr(self, name)
            _checks.require(parameter.grad is not None, self._op, name, rule, None)
            parts.append((parameter * parameter.grad).abs())
        gain, a, b = parts
        dims = (0, 1) if self._transposed else (1, 0)
        return gain + a.mean(dims[0]) + b.mean(dims[1])

    @torch.no_grad()
    def keep_ranks(self, kept: torch.Tensor) -> None:
        """Let only the ranks of ``kept``, bool [R], act; "svd" zeroes the gains of the others."""
        _checks.require(kept.shape == (self.rank,), self._op, "kept", f"have shape [{self.rank}]", list(kept.shape))
        if self.form == "svd":
            self.gains.masked_fill_(~kept.view(-1, 1), 0.0)
        else:
            self.rank_mask.copy_(kept)
            self._count()

    def _count(self) -> None:
        if self.form == "top_k":
            self._buffers["current_rank"].copy_(self.rank_mask.sum())  # type: ignore[union-attr]

    @torch.no_grad()
    def compact(self) -> int:
        """Drop the ranks that do not act, and return how many are left (at least one).

        The output is unchanged, and ``scaling`` stays that of the initial rank. lora_A, lora_B and the gain are new
        Parameters: build the optimizer afterwards. A module of the full rank loads a compacted one's state dict.
        """
        kept = self.active().nonzero().view(-1)
        if not kept.numel():  # every gain of "svd" is zero
            kept = kept.new_zeros(1)
        self._resize(len(kept), kept)
        return self.rank

    def _resize(self, rank: int, kept: torch.Tensor | None = None) -> None:
        super()._resize(rank, kept)
        self.min_rank = min(self.min_rank, rank)
        if self.form != "svd" and kept is not None:
            self.rank_mask.fill_(True)
            self._count()

    def _rank_dims(self) -> dict[str, int]:
        dims = {**super()._rank_dims(), _GAINS[self.form]: 0}
        return dims | {name: 0 for name in ("rank_mask", "rank_scores") if name in self._buffers}

    def _describe(self) -> str:
        return f"form={self.form}, {super()._describe()}"
