"""One run: a method, its options and a seed."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.cli.compare import methods
from fastpeft.cli.compare.adapted import Adapted
from fastpeft.cli.compare.task import Batch, Task
from fastpeft.cli.measure import precision, synchronize

CURVE = 24  # points of a loss curve, each the mean over one such part of the run


@dataclass(frozen=True)
class Precision:
    """Device, dtype of the frozen weights, and whether products run under bf16 autocast."""

    device: torch.device
    dtype: torch.dtype
    autocast: bool

    def moved(self, batch: Batch) -> Batch:
        """The batch on the device, with floating-point inputs in the model's dtype."""
        dtypes = {name: self.dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in batch.items()}
        return {name: tensor.to(self.device, dtypes[name]) for name, tensor in batch.items()}

    def run(self, function: Callable[[], Any]) -> Any:
        with precision(self.device, self.autocast):
            return function()


@dataclass
class Trainer:
    """A model with a method in it, and an optimizer: all that a step needs."""

    task: Task
    adapted: Adapted
    optimizer: torch.optim.Optimizer | None
    where: Precision

    def loss(self, batch: Batch) -> Tensor:
        with precision(self.where.device, self.where.autocast):
            loss = self.task.loss(self.adapted.model, batch)
            return loss if self.adapted.penalty is None else loss + self.adapted.penalty()

    def step(self, batch: Batch, number: int) -> Tensor:
        """zero_grad, forward, backward, optimizer, what the method does after a step; returns the loss."""
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.adapted.after_step(number)
        return loss.detach()


def prepared(task: Task, name: str, options: dict[str, Any], seed: int, steps: int, where: Precision) -> Trainer:
    """A fresh model with the method in it, on its device, and its optimizer: AdamW with a group for the head.

    Frozen weights are in ``where.dtype``; trained parameters are at least in fp32.
    """
    torch.manual_seed(seed)
    model = task.build(seed).to(where.dtype)
    torch.manual_seed(seed)
    adapted = methods.put(name, model, task, options, steps)
    for parameter in adapted.model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    adapted.model.to(where.device)
    groups = methods.groups(name, adapted, task, options)
    return Trainer(task, adapted, torch.optim.AdamW(groups) if groups else None, where)


def batches(task: Task, seed: int, steps: int) -> Iterator[Batch]:
    """Epoch after epoch, ``steps`` batches in all."""
    epochs = (task.train(seed, epoch) for epoch in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)


def train(
    task: Task,
    name: str,
    options: dict[str, Any],
    seed: int,
    steps: int,
    where: Precision,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Train one method and test it; returns the results in plain numbers.

    The learning rates fall linearly to zero. Every method gets the same batches in the same order.
    Raises     FloatingPointError: a loss that is not finite.  And as the method does.
    """
    start, cpu = time.perf_counter(), time.process_time()
    trainer = prepared(task, name, options, seed, steps, where)
    model = trainer.adapted.model
    losses: list[float] = []
    if trainer.optimizer is not None:
        schedule = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1 - step / steps)
        model.train()
        for step, batch in enumerate(batches(task, seed, steps)):
            losses.append(float(trainer.step(where.moved(batch), step)))
            schedule.step()
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"loss must be finite, got {losses[-1]} at step {step}")
            on_step(step, losses[-1])
        if len(losses) < steps:
            raise ValueError(f"compare: task {task.name} must give {steps} batches, got {len(losses)}")
    synchronize(where.device)
    trained = time.perf_counter() - start
    metric = task.evaluate(model, where.run, where.moved)
    if not math.isfinite(metric):
        raise FloatingPointError(f"{task.metric} must be finite, got {metric}")
    return {
        "method": name,
        "options": options,
        "seed": seed,
        "learning_rate": methods.rate(name, task, options),
        "metric": metric,
        "curve": curve(losses),
        "trainable": trainable(model),
        "about": trainer.adapted.about(),
        "train_seconds": round(trained, 3),
        "seconds": round(time.perf_counter() - start, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }


def trainable(model: nn.Module) -> int:
    """Elements that require a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def curve(losses: list[float]) -> list[list[float]]:
    """[last step, mean loss] of each of ``CURVE`` parts."""
    size = max(1, -(-len(losses) // CURVE))
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    ends = itertools.accumulate(len(part) for part in parts)
    return [[end, round(sum(part) / len(part), 4)] for end, part in zip(ends, parts, strict=True)]
