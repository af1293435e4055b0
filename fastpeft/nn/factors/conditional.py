"""Conditional factors: an A and a B for each task, chosen by the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpeft.nn import init as schemes
from fastpeft.nn.config import Config, size
from fastpeft.nn.factors.base import LoRAModule
from fastpeft.nn.factors.condition import given
from fastpeft.nn.merge import Mergeable, MergeReport
from fastpeft.ops import Weight4bit, _checks, linear4bit, lora_linear_grouped


class Conditional(LoRAModule):
    """Mixin: lora_A [tasks, K, r], lora_B [tasks, r, N] (layout "in_out"), or [tasks, r, K], [tasks, N, r].

    num_tasks  how many tasks
    bias       lora_bias [tasks, N]
    Call       (x, task_id): an int, or integers of one element or of x's first dimensions, (N,) or (N, seq); -1 is the
               base alone. Without task_id that of ``fastpeft.nn.task``. The output has the shape of the base's.
    Raises     ValueError: no task_id, a shape, or an id below -1 or not below num_tasks; ids on a GPU are not checked,
               to avoid a sync, and their rows are NaN instead.  TypeError: ids that are not integers.
    """

    OWN = ("num_tasks",)
    SIZES = ("in_features", "out_features")
    POSITIONS = ("num_tasks", "rank")
    LAYOUT = "in_out"

    @classmethod
    def _configure(
        cls, in_features: int, out_features: int, options: dict[str, Any], layout: str, base: bool, *known: str
    ) -> tuple[Config, dict[str, Any]]:
        config, own = super()._configure(in_features, out_features, options, layout, base, *known)
        op = cls.__name__
        own["num_tasks"] = size(op, "num_tasks", own.get("num_tasks"))
        _checks.require(not schemes.needs_weight(config.init), op, "init", "need no base weight", repr(config.init))
        return config, own

    def _adapt(self, config: Config, device: torch.device | str | None, dtype: torch.dtype, num_tasks: int = 1) -> None:
        super()._adapt(config, device, dtype)
        self.num_tasks = num_tasks
        for name in ("lora_A", "lora_B", "lora_bias"):
            one = self._parameters[name]
            if one is not None:
                self._parameters[name] = nn.Parameter(one.new_empty(num_tasks, *one.shape))

    def _reset(self, weight: torch.Tensor | None) -> None:
        a, b = self.factors()
        for task in range(self.num_tasks):
            schemes.initialise(self.init, a.detach()[task], b.detach()[task], float(self.scaling))
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    def forward(self: Any, x: torch.Tensor, *condition: Any, task_id: Any = None) -> torch.Tensor:
        layer: Any = super()
        y: torch.Tensor = layer.forward(x, *condition, *(() if task_id is None else (task_id,)))
        return y

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [tasks, R, K] and B [tasks, N, R] whatever the layout."""
        a, b = self.lora_A, self.lora_B
        return (a.mT, b.mT) if self._transposed else (a, b)

    def _task(self, condition: tuple[Any, ...], device: torch.device) -> int | torch.Tensor:
        """The ids of a call: an int, or a tensor of integers on ``device``."""
        op, ids = self._op, given(self._op, "task_id", condition)
        if isinstance(ids, torch.Tensor):
            kind: Any = ids.dtype
            integer = not ids.is_floating_point() and not ids.is_complex() and ids.dtype != torch.bool
        else:
            kind, integer = type(ids).__name__, isinstance(ids, int) and not isinstance(ids, bool)
        _checks.require_dtype(integer, op, "task_id", "be an int or a tensor of integers", kind)
        if isinstance(ids, torch.Tensor):
            if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
                least, most = map(int, ids.aminmax())
                wrong = least if least < -1 else most
                inside = least >= -1 and most < self.num_tasks
                _checks.require(inside, op, "task_id", f"be in [-1, {self.num_tasks})", wrong)
            return ids.to(device)
        _checks.require(-1 <= ids < self.num_tasks, op, "task_id", f"be in [-1, {self.num_tasks})", ids)
        return int(ids)

    def _pair(self, *condition: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rule = "be given: each task has an update of its own"
        _checks.require(bool(condition), self._op, "task_id", rule, None)
        ids = self._task(condition, self.lora_A.device)
        if isinstance(ids, torch.Tensor):
            _checks.require(ids.numel() == 1, self._op, "task_id", "be one task", list(ids.shape))
            ids = int(ids)
        _checks.require(0 <= ids < self.num_tasks, self._op, "task_id", f"be in [0, {self.num_tasks})", ids)
        a, b = self.factors()
        return a[ids], b[ids]

    def merge(self: Any, task_id: Any = None, keep_backup: bool = True) -> MergeReport:
        """Merge the update of one task, as LoRALinear.merge does; until ``unmerge`` every call computes that task.

        Raises     ValueError: no task, and as LoRALinear.merge.
        """
        _checks.require(isinstance(self, Mergeable), self._op, "merge", "have a base layer", "none")
        _checks.require(task_id is not None, self._op, "task_id", "be given: each task has an update of its own", None)
        _checks.require(self.lora_bias is None, self._op, "lora_bias", "be None for merge()", "one for each task")
        merged: MergeReport = self._merge((task_id,), keep_backup)
        return merged

    def _grouped(self, x: torch.Tensor, weight: Any, bias: Any, condition: tuple[Any, ...]) -> torch.Tensor:
        _checks.activation(self._op, x)
        ids = self._task(condition, x.device)
        index = torch.tensor(ids, device=x.device) if isinstance(ids, int) else ids
        leading = x.shape[:-1]
        fits = index.numel() == 1 or index.shape == leading[: index.dim()]
        rule = f"have x's first dimensions, {list(leading)}, or one element"
        _checks.require(fits, self._op, "task_id", rule, list(index.shape))
        a, b = self.factors()
        p = self.dropout_probability if self.training else 0.0
        return lora_linear_grouped(
            x, weight, a, b, index, bias, self.lora_bias, scale=self.scaling, dropout=p, backend=self.backend
        )

    def _adapter(self, x: torch.Tensor, *condition: Any) -> torch.Tensor:
        return self._grouped(x, None, None, condition)

    def _linear(self, x: torch.Tensor, weight: Any, bias: Any, *condition: Any) -> torch.Tensor:
        return self._grouped(x, weight, bias, condition)

    def _linear4bit(self, x: torch.Tensor, weight: Weight4bit, bias: Any, *condition: Any) -> torch.Tensor:
        return linear4bit(x, weight, bias, backend=self.backend) + self._grouped(x, None, None, condition)

    def _describe(self) -> str:
        return f"num_tasks={self.num_tasks}, {super()._describe()}"
