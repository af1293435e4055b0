"""Hyper factors: a small network computes A and B from a task's embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpeft.nn.config import Config, size
from fastpeft.nn.factors.base import LoRAModule
from fastpeft.nn.factors.condition import given
from fastpeft.nn.merge import Mergeable, MergeReport
from fastpeft.ops import Weight4bit, _checks, linear4bit, lora_adapter, lora_linear

_HIDDEN = 64


class Hyper(LoRAModule):
    """Mixin: hyper_net, an MLP of 64 hidden units that computes A and B; the half for B is zero at init.

    task_embedding_dim    E, the size of an embedding
    Call       (x, task_embedding): (E,) or (1, E) for all rows, (N, E) with x [N, ..., K]; without it that of
               ``fastpeft.nn.task``
    Raises     ValueError: no task_embedding, or a shape.  TypeError: not a float tensor.

    One embedding gives one A and one B, at the cost of plain LoRA. N embeddings give N of each, applied in two batched
    products.
    """

    OWN = ("task_embedding_dim",)
    SIZES = ("in_features", "out_features")
    POSITIONS = ("rank", "task_embedding_dim")
    LAYOUT = "in_out"

    hyper_net: nn.Sequential

    @classmethod
    def _configure(
        cls, in_features: int, out_features: int, options: dict[str, Any], layout: str, base: bool, *known: str
    ) -> tuple[Config, dict[str, Any]]:
        op = cls.__name__
        init = options.get("init")
        _checks.require(init is None, op, "init", "be None: hyper_net makes A and B", init)
        config, own = super()._configure(in_features, out_features, options, layout, base, *known)
        return config, {"task_embedding_dim": size(op, "task_embedding_dim", own.get("task_embedding_dim", 16))}

    def _adapt(
        self, config: Config, device: torch.device | str | None, dtype: torch.dtype, task_embedding_dim: int = 16
    ) -> None:
        super()._adapt(config, device, dtype)
        del self.lora_A, self.lora_B
        self.task_embedding_dim = task_embedding_dim
        count = config.rank * (config.in_features + config.out_features)
        first = nn.Linear(task_embedding_dim, _HIDDEN, device=device, dtype=dtype)
        self.hyper_net = nn.Sequential(first, nn.ReLU(), nn.Linear(_HIDDEN, count, device=device, dtype=dtype))

    def _reset(self, weight: torch.Tensor | None) -> None:
        first: Any = self.hyper_net[0]
        last: Any = self.hyper_net[2]
        first.reset_parameters()
        last.reset_parameters()
        half = self.rank * self.in_features
        with torch.no_grad():
            last.weight[half:].zero_()
            last.bias[half:].zero_()
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    def forward(self: Any, x: torch.Tensor, *condition: Any, task_embedding: Any = None) -> torch.Tensor:
        layer: Any = super()
        y: torch.Tensor = layer.forward(x, *condition, *(() if task_embedding is None else (task_embedding,)))
        return y

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises ValueError: without an embedding there are none; ``factors_of`` takes one."""
        _checks.require(False, self._op, "task_embedding", "be given", None)
        raise AssertionError

    def factors_of(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A [..., R, K] and B [..., N, R] for embeddings [..., E]."""
        made = self.hyper_net(embedding.to(next(self.hyper_net.parameters()).dtype))
        R, K, N = self.rank, self.in_features, self.out_features
        a, b = made.split((R * K, N * R), dim=-1)
        if self._transposed:
            return a.unflatten(-1, (K, R)).mT, b.unflatten(-1, (R, N)).mT
        return a.unflatten(-1, (R, K)), b.unflatten(-1, (N, R))

    def _given(self, x: torch.Tensor, condition: tuple[Any, ...]) -> torch.Tensor:
        """The embedding of a call, [E], or [N, E] for N samples, checked against x."""
        held = next(self.hyper_net.parameters())
        _checks.activation(self._op, x)
        _checks.entrance(self._op, x, "hyper_net", self.in_features, held.device)
        return self._embedding(condition, x.device)

    def _embedding(self, condition: tuple[Any, ...], device: torch.device) -> torch.Tensor:
        """[E], or [N, E] for N samples."""
        op, value = self._op, given(self._op, "task_embedding", condition)
        _checks.dense(op, "task_embedding", value)
        _checks.floats(op, "task_embedding", value.dtype)
        E = self.task_embedding_dim
        fits = value.dim() in (1, 2) and value.shape[-1] == E
        _checks.require(fits, op, "task_embedding", f"have shape [{E}], [1, {E}] or [N, {E}]", list(value.shape))
        value = value.to(device)
        return value[0] if value.dim() == 2 and value.shape[0] == 1 else value

    def _pair(self, *condition: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rule = "be given: each task has an update of its own"
        _checks.require(bool(condition), self._op, "task_embedding", rule, None)
        embedding = self._embedding(condition, next(self.hyper_net.parameters()).device)
        _checks.require(embedding.dim() == 1, self._op, "task_embedding", "be one task's", list(embedding.shape))
        return self.factors_of(embedding)

    def merge(self: Any, task_embedding: Any = None, keep_backup: bool = True) -> MergeReport:
        """Merge the update of one embedding, as LoRALinear.merge does; until ``unmerge`` every call computes that one.

        Raises     ValueError: no embedding, or several; and as LoRALinear.merge.
        """
        _checks.require(isinstance(self, Mergeable), self._op, "merge", "have a base layer", "none")
        rule = "be given: each task has an update of its own"
        _checks.require(task_embedding is not None, self._op, "task_embedding", rule, None)
        merged: MergeReport = self._merge((task_embedding,), keep_backup)
        return merged

    def _each(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """The update with an A and a B for each sample: two batched products, in the dtype of autocast or of x."""
        op, N = self._op, embedding.shape[0]
        fits = x.dim() >= 2 and x.shape[0] == N
        _checks.require(fits, op, "task_embedding", "have a row for each of x's first dimension", list(embedding.shape))
        rule = "be None or 'eager' for an embedding of each sample: two batched products of torch"
        _checks.require(self.backend in (None, "eager"), op, "backend", rule, repr(self.backend))
        a, b = self.factors_of(embedding)
        p = self.dropout_probability if self.training else 0.0
        samples = nn.functional.dropout(x, p) if p else x
        samples = samples.reshape(N, x.shape[1:-1].numel(), x.shape[-1])
        y = samples @ a.mT.to(x.dtype) @ (b.mT * self.scaling).to(x.dtype)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.lora_bias is None else y + (self.lora_bias * self.scaling).to(y.dtype)

    def _adapter(self, x: torch.Tensor, *condition: Any) -> torch.Tensor:
        embedding = self._given(x, condition)
        if embedding.dim() == 2:
            return self._each(x, embedding)
        a, b = self.factors_of(embedding)
        p = self.dropout_probability if self.training else 0.0
        return lora_adapter(x, a, b, self.lora_bias, scale=self.scaling, dropout=p, backend=self.backend)

    def _linear(self, x: torch.Tensor, weight: Any, bias: Any, *condition: Any) -> torch.Tensor:
        embedding = self._given(x, condition)
        if embedding.dim() == 2:
            if not torch.is_autocast_enabled(x.device.type):
                rule = f"have the dtype of weight, {weight.dtype}, outside autocast"
                _checks.require_dtype(x.dtype == weight.dtype, self._op, "x", rule, x.dtype)
            return nn.functional.linear(x, weight, bias) + self._each(x, embedding)
        a, b = self.factors_of(embedding)
        p = self.dropout_probability if self.training else 0.0
        return lora_linear(x, weight, a, b, bias, self.lora_bias, scale=self.scaling, dropout=p, backend=self.backend)

    def _linear4bit(self, x: torch.Tensor, weight: Weight4bit, bias: Any, *condition: Any) -> torch.Tensor:
        return linear4bit(x, weight, bias, backend=self.backend) + self._adapter(x, *condition)

    def _describe(self) -> str:
        return f"task_embedding_dim={self.task_embedding_dim}, {super()._describe()}"
