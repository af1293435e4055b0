"""Sparse factors: masks drawn once, at random, in blocks or n of every m."""

from __future__ import annotations

import re
from typing import Any

import torch

from fastpeft.nn.config import Config, number, size
from fastpeft.nn.factors.masked import Masked
from fastpeft.ops import _checks


def _of_every(pattern: str) -> tuple[int, int] | None:
    """(n, m) of "n:m"; None where the pattern is another one."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(match[1]), int(match[2])) if match else None


class Sparse(Masked):
    """Mixin: a share ``sparsity`` of lora_A and lora_B is zero and stays zero.

    sparsity   in [0, 1]; default 0.5, or that of an n:m pattern
    pattern    "random": each element alone · "block": ``block_size`` neighbours together · "n:m", such as "2:4": n of
               every m neighbours are kept. Neighbours run along the inputs in A and along the outputs in B
    block_size elements of a block
    """

    OWN = ("sparsity", "pattern", "block_size")
    SIZES = ("in_features", "out_features")
    POSITIONS = ("rank", "sparsity", "pattern")
    LAYOUT = "in_out"

    @classmethod
    def _configure(
        cls, in_features: int, out_features: int, options: dict[str, Any], layout: str, base: bool, *known: str
    ) -> tuple[Config, dict[str, Any]]:
        config, own = super()._configure(in_features, out_features, options, layout, base, *known)
        op, pattern = cls.__name__, own.get("pattern", "random")
        kept = _of_every(pattern) if isinstance(pattern, str) else None
        rule = "be 'random', 'block' or 'n:m' with 0 < n <= m, such as '2:4'"
        sound = 0 < kept[0] <= kept[1] if kept else pattern in ("random", "block")
        _checks.require(sound, op, "pattern", rule, repr(pattern))
        share = own.get("sparsity")
        share = (1 - kept[0] / kept[1] if kept else 0.5) if share is None else share
        block = size(op, "block_size", own.get("block_size", 16))
        return config, {"sparsity": _share(op, share, pattern), "pattern": pattern, "block_size": block}

    def _adapt(
        self,
        config: Config,
        device: torch.device | str | None,
        dtype: torch.dtype,
        sparsity: float = 0.5,
        pattern: str = "random",
        block_size: int = 16,
    ) -> None:
        super()._adapt(config, device, dtype)
        self.pattern, self.block_size, self._wanted = pattern, block_size, sparsity

    def _reset(self, weight: torch.Tensor | None) -> None:
        super()._reset(weight)
        self.apply_sparsity(self._wanted)

    @torch.no_grad()
    def apply_sparsity(self, sparsity: float) -> None:
        """Draw the masks again: newly masked elements become zero; newly unmasked ones start at zero and are trained.

        Raises     ValueError: not in [0, 1], or another share than an n:m pattern has.
        """
        self._wanted = _share(self._op, sparsity, self.pattern)
        device = self.lora_A.device
        self._mask(self._drawn(self.in_features, device), self._drawn(self.out_features, device))

    def _drawn(self, columns: int, device: torch.device) -> torch.Tensor:
        """Booleans [R, columns]."""
        rank, kept = self.rank, _of_every(self.pattern)
        if kept:
            n, m = kept
            groups = -(-columns // m)
            # Columns past the last are never kept, so that an incomplete group keeps real ones.
            draw = torch.rand(rank, groups * m, device=device)
            draw[:, columns:] = -1.0
            order = draw.view(rank, groups, m).argsort(-1, descending=True).argsort(-1)
            return (order < n).flatten(1)[:, :columns]
        if self.pattern == "block":
            blocks = torch.rand(rank, -(-columns // self.block_size), device=device) >= self._wanted
            return blocks.repeat_interleave(self.block_size, dim=1)[:, :columns]
        return torch.rand(rank, columns, device=device) >= self._wanted

    def _describe(self) -> str:
        return f"sparsity={self._wanted:g}, pattern={self.pattern}, {super()._describe()}"


def _share(op: str, sparsity: object, pattern: str) -> float:
    share, kept = number(op, "sparsity", sparsity), _of_every(pattern)
    _checks.require(0.0 <= share <= 1.0, op, "sparsity", "be in [0, 1]", share)
    if kept:
        own = 1 - kept[0] / kept[1]
        _checks.require(abs(share - own) < 1e-9, op, "sparsity", f"be {own:g} for pattern {pattern!r}", share)
    return share
