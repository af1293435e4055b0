"""Factors with a mask of one bit per element: masked elements are zero, and stay zero.

The parameters themselves hold zeros there, so forward is that of plain LoRA; the kernels mask the gradients as they
write them. Zero is then a fixed point of SGD, Adam, AdamW and Lion with their momenta and decay. An optimizer that
mixes elements (Muon, Shampoo) overwrites the zeros: `remask_after` restores them after each of its steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastpeft.nn.config import Config
from fastpeft.nn.factors.ranks import Shrinking
from fastpeft.ops import _checks, lora_adapter, pack_mask, unpack_mask
from fastpeft.ops.lora_linear import lora_linear

_MASKS = ("mask_A", "mask_B")


class Masked(Shrinking):
    """Mixin: lora_A and lora_B with their masks, packed in buffers: mask_A [r, ceil(K / 8)], mask_B [r, ceil(N / 8)].

    In a state dict mask_A and mask_B are these bits; float or boolean masks of the factors' shapes load too.
    """

    def _adapt(self, config: Config, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super()._adapt(config, device, dtype)
        for name, columns in zip(_MASKS, (config.in_features, config.out_features), strict=True):
            # Under the public names, which properties return as tensors of 0 and 1.
            self._buffers[name] = torch.empty(config.rank, -(-columns // 8), dtype=torch.uint8, device=device)

    def _bits(self) -> tuple[torch.Tensor, torch.Tensor]:
        held: dict[str, Any] = self._buffers
        return held["mask_A"], held["mask_B"]

    def _kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Booleans [R, K] and [R, N]."""
        a, b = self._bits()
        return unpack_mask(a, self.in_features), unpack_mask(b, self.out_features)

    @property
    def mask_A(self) -> torch.Tensor:
        """lora_A's mask, of 0 and 1, in its shape and dtype."""
        kept = self._kept()[0]
        return (kept.t() if self._transposed else kept).to(self.lora_A.dtype)

    @property
    def mask_B(self) -> torch.Tensor:
        """lora_B's mask, of 0 and 1, in its shape and dtype."""
        kept = self._kept()[1]
        return (kept if self._transposed else kept.t()).to(self.lora_B.dtype)

    @property
    def sparsity(self) -> float:
        """The share of zeros in both masks together; waits for the device."""
        kept = self._kept()
        return 1.0 - sum(int(each.sum()) for each in kept) / sum(each.numel() for each in kept)

    @torch.no_grad()
    def _mask(self, kept_a: torch.Tensor, kept_b: torch.Tensor) -> None:
        """Take these masks, booleans [R, K] and [R, N], and zero what they hide."""
        for bits, kept in zip(self._bits(), (kept_a, kept_b), strict=True):
            bits.copy_(pack_mask(kept))
        self.remask()

    @torch.no_grad()
    def remask(self) -> None:
        """Zero what the masks hide, after something other than training has written the parameters."""
        for parameter, kept in zip(self._plain(), self._kept(), strict=True):
            parameter.masked_fill_(~kept, 0.0)

    def _plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, K] and Bᵀ [R, N]: views of the parameters."""
        return (self.lora_A.t(), self.lora_B) if self._transposed else (self.lora_A, self.lora_B.t())

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, K] and B [N, R], times their masks: for products that do not mask the gradients themselves."""
        a, b = super().factors()
        kept_a, kept_b = self._kept()
        return a * kept_a, b * kept_b.t()

    def _adapter(self, x: torch.Tensor, *condition: Any) -> torch.Tensor:
        if condition:
            self._unconditional(condition)
        a, b = super().factors()
        p = self.dropout_probability if self.training else 0.0
        return lora_adapter(
            x, a, b, self._lora_bias(), scale=self.scaling, dropout=p, masks=self._bits(), backend=self.backend
        )

    def _linear(self, x: torch.Tensor, weight: Any, bias: Any, *condition: Any) -> torch.Tensor:
        if condition:
            self._unconditional(condition)
        a, b = super().factors()
        p = self.dropout_probability if self.training else 0.0
        return lora_linear(
            x, weight, a, b, bias, self._lora_bias(), scale=self.scaling, dropout=p, masks=self._bits(),
            backend=self.backend,
        )  # fmt: skip

    def _rank_dims(self) -> dict[str, int]:
        return super()._rank_dims() | dict.fromkeys(_MASKS, 0)

    @torch.no_grad()
    def compact(self) -> int:
        """Drop the ranks whose A or B is masked completely, and return how many are left (at least one).

        The output is unchanged, and ``scaling`` stays that of the initial rank. lora_A and lora_B are new Parameters:
        build the optimizer afterwards. A module of the full rank loads a compacted one's state dict.
        """
        a, b = self._kept()
        kept = (a.any(1) & b.any(1)).nonzero().view(-1)
        if not kept.numel():
            kept = kept.new_zeros(1)
        self._resize(len(kept), kept)
        return self.rank

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state = dict(state_dict)
        for name, parameter, turned in (
            ("mask_A", "lora_A", self._transposed),
            ("mask_B", "lora_B", not self._transposed),
        ):
            mask, values = state.get(prefix + name), state.get(prefix + parameter)
            if isinstance(mask, torch.Tensor) and isinstance(values, torch.Tensor) and mask.shape == values.shape:
                state[prefix + name] = pack_mask((mask.t() if turned else mask) != 0)
        super()._load_from_state_dict(state, prefix, *args)
        if not self.lora_A.is_meta:
            self.remask()


def remask_after(optimizer: torch.optim.Optimizer, module: nn.Module) -> RemovableHandle:
    """Zero the masked elements of every sparse or pruned layer in ``module`` after each step of ``optimizer``.

    For optimizers that mix the elements of a matrix (Muon, Shampoo); SGD, Adam, AdamW and Lion leave zeros alone.
    Returns    the hook: its ``remove()`` ends it
    Raises     TypeError: no optimizer or module.  ValueError: no layer with masks.
    """
    op = "remask_after"
    optimizes = isinstance(optimizer, torch.optim.Optimizer)
    _checks.require_dtype(optimizes, op, "optimizer", "be a torch Optimizer", type(optimizer).__name__)
    _checks.require_dtype(isinstance(module, nn.Module), op, "module", "be an nn.Module", type(module).__name__)
    layers = [child for child in module.modules() if isinstance(child, Masked)]
    _checks.require(bool(layers), op, "module", "hold sparse or pruned layers", "none")

    def remask(*_: Any) -> None:
        for layer in layers:
            layer.remask()

    return optimizer.register_step_post_hook(remask)
