"""A task on which methods are compared: a frozen model, batches, a loss and a metric."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.ops import _checks

Batch = dict[str, Tensor]


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model returns for a batch with labels."""
    loss: Tensor = model(**batch).loss
    return loss


def right(model: nn.Module, batch: Batch) -> float:
    """How many rows of a batch the model classifies correctly."""
    return float((model(**batch).logits.argmax(-1) == batch["labels"]).sum())


def nats(model: nn.Module, batch: Batch) -> float:
    """The loss of a batch, summed over its rows."""
    return float(model_loss(model, batch)) * len(batch["labels"])


def projections(model: nn.Module) -> list[str]:
    """The names of all nn.Linear in the repeated layers of a model: neither its head nor a pooler."""
    stacks = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside = tuple(f"{path}." for path in stacks)
    return [path for path, module in model.named_modules() if type(module) is nn.Linear and path.startswith(inside)]


@dataclass(frozen=True)
class Task:
    """One task, the same for every method; the function given to ``--task`` returns it.

    name       of the task, for tables
    build      build(seed) -> the pretrained model on the CPU, new at each call; the seed is for weights not pretrained
    train      train(seed, epoch) -> the batches of one epoch in their order: the same for every method
    test       batches that no method is trained on
    loss       loss(model, batch) -> the mean loss, with a gradient
    score      score(model, batch) -> a number that is summed over the batches of ``test`` and divided by their rows
    finish     the metric of that mean
    metric     its name
    higher     whether a higher metric is better
    head       names of the modules that every method trains whole
    head_rate  learning rate of the head in every method except the one that trains only the head
    targets    targets(model) -> names of the layers that LoRA and its variants adapt; None: every one but the head
    adapter_targets    names of the layers after which bottleneck adapters are put; None: the manager's defaults
    rates      {method: learning rate} if a method's usual rate does not fit this task
    first_tokens    int64 [T >= 1] of ordinary text, from which prompts and prefixes start; None: from random numbers
    kind       PEFT's task type; None: not a transformers model
    methods    the default of ``--methods``
    steps      the default of ``--steps``; None: whole epochs
    """

    name: str
    build: Callable[[int], nn.Module]
    train: Callable[[int, int], list[Batch]]
    test: list[Batch]
    loss: Callable[[nn.Module, Batch], Tensor] = model_loss
    score: Callable[[nn.Module, Batch], float] = right
    finish: Callable[[float], float] = float
    metric: str = "accuracy"
    higher: bool = True
    head: tuple[str, ...] = ()
    head_rate: float = 1e-3
    targets: Callable[[nn.Module], list[str]] | None = projections
    adapter_targets: tuple[str, ...] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    first_tokens: Tensor | None = None
    kind: str | None = None
    methods: tuple[str, ...] = ("lora", "adalora", "sparse", "adapter", "head")
    steps: int | None = None

    def names(self, model: nn.Module) -> list[str] | None:
        """The layers that LoRA adapts, by name."""
        return None if self.targets is None else self.targets(model)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, run: Callable[[Callable[[], float]], float], moved: Callable[[Batch], Batch]
    ) -> float:
        """The metric on ``test``, in eval mode.

        run        calls its argument under the precision of the comparison
        moved      moves a batch to the model's device
        """
        model.eval()
        total, rows = 0.0, 0
        for batch in self.test:
            there = moved(batch)
            total += run(lambda there=there: self.score(model, there))  # type: ignore[misc]
            rows += len(next(iter(batch.values())))
        return self.finish(total / rows)


def exp(mean: float) -> float:
    """Perplexity of a mean loss in nats; infinite if it overflows a float."""
    return math.exp(mean) if mean < 700 else math.inf


def own(place: str, options: Mapping[str, Any]) -> Task:
    """The task that a function in a file makes: ``my_task.py:make``.

    The function is called with those ``options`` for which it has parameters.
    Raises     ValueError: no such file or function, or it returns no Task.
    """
    file, _, name = place.rpartition(":")
    _checks.require(Path(file).is_file(), "compare", "--task", "name a file, as in my_task.py:make", repr(place))
    spec = importlib.util.spec_from_file_location("fastpeft_own_task", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    _checks.require(callable(function), "compare", "--task", f"name a function of {file}", repr(name))
    assert callable(function)
    wanted = inspect.signature(function).parameters
    task = function(**{key: value for key, value in options.items() if key in wanted})
    rule = "name a function that returns a fastpeft.cli.compare.Task"
    _checks.require(isinstance(task, Task), "compare", "--task", rule, type(task).__name__)
    assert isinstance(task, Task)
    return task
