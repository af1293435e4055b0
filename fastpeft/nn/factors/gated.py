"""Attention-guided factors: a gate over the rank, computed from the x that A reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpeft.nn.config import Config, number
from fastpeft.nn.factors.base import LoRAModule
from fastpeft.ops import Weight4bit, _checks, linear4bit, lora_between

GATES = ("softmax", "sigmoid")


class Gated(LoRAModule):
    """Mixin: y = scaling · ((gate ∘ drop(x) Aᵀ) Bᵀ + lora_bias), gate = gate_scale · softmax(attention(drop(x))).

    gate       "softmax" over the rank, whose mean is 1/r, or "sigmoid"
    gate_scale gate_scale=rank makes the mean of a softmax 1
    State      attention.weight [r, K], attention.bias [r] beside lora_A and lora_B; B = 0 at init
    Raises     ValueError: rank 1 with softmax, whose gate is always 1; merge(), because the update depends on x and is
               no matrix.

    A and the attention's weight share one shrink: x is read once.
    """

    OWN = ("gate", "gate_scale")
    SIZES = ("in_features", "out_features")
    POSITIONS = ("rank", "gate", "gate_scale")
    LAYOUT = "in_out"

    @classmethod
    def _configure(
        cls, in_features: int, out_features: int, options: dict[str, Any], layout: str, base: bool, *known: str
    ) -> tuple[Config, dict[str, Any]]:
        config, own = super()._configure(in_features, out_features, options, layout, base, *known)
        op = cls.__name__
        gate, factor = own.get("gate", "softmax"), number(op, "gate_scale", own.get("gate_scale", 1.0))
        _checks.one_of(op, "gate", gate, GATES)
        rule = "be at least 2 with gate='softmax', which over one rank is 1 for every x"
        _checks.require(gate != "softmax" or config.rank > 1, op, "rank", rule, config.rank)
        return config, {"gate": gate, "gate_scale": factor}

    def _adapt(
        self,
        config: Config,
        device: torch.device | str | None,
        dtype: torch.dtype,
        gate: str = "softmax",
        gate_scale: float = 1.0,
    ) -> None:
        super()._adapt(config, device, dtype)
        self.gate, self.gate_scale = gate, gate_scale
        self.attention = nn.Linear(config.in_features, config.rank, device=device, dtype=dtype)

    def _reset(self, weight: torch.Tensor | None) -> None:
        super()._reset(weight)
        self.attention.reset_parameters()

    def _pair(self, *condition: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rule = "be one matrix for merge(), delta_weight() and to_linear()"
        _checks.require(False, self._op, "update", rule, "a gate that depends on x")
        raise AssertionError

    def _gated(self, x: torch.Tensor, weight: Any, bias: Any, condition: tuple[Any, ...]) -> torch.Tensor:
        if condition:
            self._unconditional(condition)
        a, b = self.factors()
        attention = self.attention.weight
        dtype = torch.promote_types(a.dtype, attention.dtype)
        if dtype == torch.float16 and x.device.type == "cpu":  # autocast on a CPU concatenates no fp16
            dtype = torch.float32

        def gated(s: torch.Tensor) -> torch.Tensor:
            values, logits = s.split(self.rank, dim=-1)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) + self.attention.bias
            gate = logits.softmax(-1) if self.gate == "softmax" else logits.sigmoid()
            return (values * (gate * self.gate_scale)).to(s.dtype)

        return lora_between(
            x,
            torch.cat((a.to(dtype), attention.to(dtype))),
            b,
            gated,
            weight=weight,
            bias=bias,
            lora_bias=self.lora_bias,
            scale=self.scaling,
            dropout=self.dropout_probability if self.training else 0.0,
            backend=self.backend,
        )

    def _adapter(self, x: torch.Tensor, *condition: Any) -> torch.Tensor:
        return self._gated(x, None, None, condition)

    def _linear(self, x: torch.Tensor, weight: Any, bias: Any, *condition: Any) -> torch.Tensor:
        return self._gated(x, weight, bias, condition)

    def _linear4bit(self, x: torch.Tensor, weight: Weight4bit, bias: Any, *condition: Any) -> torch.Tensor:
        return linear4bit(x, weight, bias, backend=self.backend) + self._gated(x, None, None, condition)

    def _describe(self) -> str:
        scaled = "" if self.gate_scale == 1.0 else f", gate_scale={self.gate_scale:g}"
        return f"gate={self.gate}{scaled}, {super()._describe()}"
