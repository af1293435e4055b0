"""The cost of a step of each method: memory, and time with all methods taking turns in one process."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastpeft.cli.compare.task import Batch, Task
from fastpeft.cli.compare.training import Precision, Trainer, prepared, trainable
from fastpeft.cli.measure import kept_for_backward, peak_allocated, synchronize

CLOCKS = ("wall", "cpu")
WARM_UP = 2  # rounds that are not counted: allocator, thread pool, on a GPU the compilation of kernels


def width(batch: Batch) -> int:
    """Elements of a batch's first tensor."""
    return next(iter(batch.values())).numel()


def nbytes(tensors: Any) -> int:
    """Bytes of all storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def memory(trainer: Trainer, batch: Batch) -> dict[str, int]:
    """Bytes of one training step on ``batch``.

    weights      parameters and buffers, packed ones as they are
    trained      gradients and the optimizer's states
    kept         tensors kept between forward and backward, beyond weights
    peak         of a whole step after the first, weights and states included
    trainable    elements, not bytes
    """
    model, device = trainer.adapted.model, trainer.where.device
    batch = {name: tensor.clone() for name, tensor in trainer.where.moved(batch).items()}  # a view keeps a whole epoch
    model.train()
    trainer.step(batch, 0)  # the optimizer allocates its states
    assert trainer.optimizer is not None
    trainer.optimizer.zero_grad(set_to_none=True)
    kept = kept_for_backward(model, lambda: trainer.loss(batch))
    states = [v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    weights, states_bytes = nbytes((*model.parameters(), *model.buffers())), nbytes(states)
    step = peak_allocated(device, lambda: trainer.step(batch, 1))
    gradients = nbytes(p.grad for p in model.parameters() if p.grad is not None)
    trainer.optimizer.zero_grad(set_to_none=True)
    return {
        "weights": weights,
        "trained": states_bytes + gradients,
        "kept": kept,
        "peak": weights + states_bytes + step,
        "trainable": trainable(model),
    }


def share(model: nn.Module, held: dict[str, torch.Tensor]) -> nn.Module:
    """Let ``model`` share the weights of the first model given, so that all methods use one set of weights."""
    for name, parameter in model.named_parameters():
        first = held.setdefault(name, parameter.data)
        if first.shape == parameter.shape and first.dtype == parameter.dtype and torch.equal(first, parameter.data):
            parameter.data = first
    return model


def sharing(task: Task) -> tuple[Task, Callable[[Trainer], None]]:
    """A task whose models share their frozen weights, and a function that gives a trainer its own trained weights."""
    held: dict[str, torch.Tensor] = {}

    def apart(trainer: Trainer) -> None:
        for parameter in trainer.adapted.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.clone()

    return replace(task, build=lambda seed: share(task.build(seed), held)), apart


def times(
    trainers: Mapping[str, Trainer], batch: Batch, rounds: int, on_round: Callable[[int], None] = lambda number: None
) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds of a step of each trainer, per round; the first of one round is the last of the next.

    Other load on the machine affects all methods alike, so ratios within a round are fair even on a busy machine.
    """
    seconds: dict[str, list[tuple[float, float]]] = {key: [] for key in trainers}
    order = list(trainers)
    for number in range(WARM_UP + rounds):
        for key in order:
            trainer = trainers[key]
            device = trainer.where.device
            moved = trainer.where.moved(batch)
            synchronize(device)
            start = time.perf_counter(), time.process_time()
            trainer.step(moved, number)
            synchronize(device)
            seconds[key].append((time.perf_counter() - start[0], time.process_time() - start[1]))
        order = [*order[1:], order[0]]
        on_round(number)
    return {key: values[WARM_UP:] for key, values in seconds.items()}


def summary(seconds: Mapping[str, Sequence[tuple[float, float]]], clock: str) -> dict[str, dict[str, Any]]:
    """For each method, [lower quartile, median, upper quartile] of both clocks' seconds, and of the ratio to the first
    method within a round by the named clock."""
    index = CLOCKS.index(clock)
    first = [pair[index] for pair in next(iter(seconds.values()))]
    made: dict[str, dict[str, Any]] = {}
    for key, pairs in seconds.items():
        ratios = [pair[index] / max(start, 1e-9) for start, pair in zip(first, pairs, strict=True)]
        made[key] = {name: quartiles([pair[i] for pair in pairs]) for i, name in enumerate(CLOCKS)}
        made[key]["ratio"] = quartiles(ratios)
    return made


def quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3


def load() -> float | None:
    """Processes that ran or waited in the last minute, including this one; None if the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def measure(
    task: Task,
    points: Mapping[str, tuple[str, dict[str, Any]]],
    steps: int,
    where: Precision,
    rounds: int,
    on_round: Callable[[int], None] = lambda number: None,
) -> dict[str, Any]:
    """Memory and step time of every point {key: (method, options)}; a method that fails is left out.

    Memory is measured on the widest batch of an epoch, time on the batch of median width.
    """
    epoch = sorted(task.train(0, 0), key=width)
    widest, median = epoch[-1], epoch[len(epoch) // 2]
    shared, apart = sharing(task)
    before, found, trainers = load(), {}, {}
    for key, (name, options) in points.items():
        trainer = prepared(shared, name, options, 0, steps, where)
        apart(trainer)
        if trainer.optimizer is None:
            continue
        found[key] = memory(trainer, widest)
        trainers[key] = trainer
    clock = "cpu" if where.device.type == "cpu" else "wall"  # processor time excludes what other processes take
    seconds = summary(times(trainers, median, rounds, on_round), clock) if trainers else {}
    after = load()
    return {
        "memory": found,
        "memory_batch": list(next(iter(widest.values())).shape),
        "time": seconds,
        "time_batch": list(next(iter(median.values())).shape),
        "clock": clock,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "load_average": [before, after],
        "busy": None if after is None else bool(max(before or 0, after) > torch.get_num_threads() + 0.5),
    }
