"""One task, two models that learn it in turn on the same batches, and the numbers of both."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from _measure import (
    Contender,
    Scores,
    compare_losses,
    evaluate,
    kept_for_backward,
    peak_of_step,
    time_ratio,
    train_side_by_side,
)
from fastpeft.cli.console import machine, progress
from fastpeft.cli.data import Batch
from fastpeft.cli.measure import precision, to_device

CHECKED_BATCHES = 4  # of the test set, on which the reloaded adapter's logits are compared


@dataclass(frozen=True)
class Lora:
    """The adapter of every linear layer but the head."""

    rank: int
    alpha: float
    dropout: float


@dataclass(frozen=True)
class Task:
    """What is trained on what."""

    name: str
    kind: str  # PEFT's task type: "CAUSAL_LM" or "SEQ_CLS"
    build: Callable[[], nn.Module]  # the frozen model on the CPU; the same weights at each call
    lora: Lora
    train: list[Batch]
    test: list[Batch]
    learning_rate: float
    bf16: bool
    device: torch.device
    seed: int
    output: Path


def side_by_side(
    task: Task, both: Sequence[Contender], out: Console, before: Scores | None = None, same_start: bool = True
) -> dict[str, Any]:
    """Trains both, measures both; the summary in plain numbers, ready for JSON.

    before: the frozen model's scores, where the caller has them (a new adapter changes nothing); measured otherwise.
    same_start: both frozen models compute the same, so that one measurement serves both.
    """
    first, second = both
    trainable = sum(p.numel() for p in first.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in first.model.parameters())
    out.print(
        f"\n{trainable:,} of {total:,} weights are trained; {len(task.train)} steps each, in turn, on {task.device}\n"
    )
    widest = max(task.train, key=lambda batch: batch["input_ids"].numel())
    kept = {one.name: kept_for_backward(one.model, widest, task.bf16, task.seed) for one in both}
    peak = {one.name: peak_of_step(one.model, widest, task.bf16, task.seed) for one in both}
    with progress(out) as bars:
        if same_start:
            scores = before or _evaluate(task, first, "test before", bars)
            start = {one.name: scores for one in both}
        else:
            start = {one.name: _evaluate(task, one, f"before, {one.name}", bars) for one in both}
        bar = bars.add_task("train both in turn", total=len(task.train), extra="")

        def on_step(step: int) -> None:
            spread = [sum(one.losses[-25:]) / len(one.losses[-25:]) for one in both]
            said = ", ".join(f"{loss:.3f} {one.name}" for loss, one in zip(spread, both, strict=True))
            bars.update(bar, advance=1, extra=f"loss {said}")

        train_side_by_side(
            both, task.train, learning_rate=task.learning_rate, bf16=task.bf16, seed=task.seed, on_step=on_step
        )
        after = {one.name: _evaluate(task, one, f"test {one.name}", bars) for one in both}
    summary: dict[str, Any] = {
        "task": task.name,
        "machine": machine(task.device),
        "settings": {
            **asdict(task.lora),
            "learning_rate": task.learning_rate,
            "precision": "bf16 autocast" if task.bf16 else "fp32",
            "seed": task.seed,
            "steps": len(task.train),
            "batch": list(widest["input_ids"].shape),
        },
        "trainable": trainable,
        "parameters": total,
        "before": _numbers(start[first.name]),
        "runs": {
            one.name: {
                "before": _numbers(start[one.name]),
                **_run(one, task.train, after[one.name]),
                "kept_for_backward_bytes": kept[one.name],
                "peak_step_bytes": peak[one.name],
            }
            for one in both
        },
        "time_ratio": time_ratio(first.seconds, second.seconds),
        "loss_curves": compare_losses(first.losses, second.losses),
    }
    if (decided := after[first.name].logits) is not None:
        other = after[second.name].logits
        summary["decided_differently"] = float((decided.argmax(-1) != other.argmax(-1)).float().mean())
    return summary


def checked_batches(task: Task) -> list[Batch]:
    return task.test[:: max(1, len(task.test) // CHECKED_BATCHES)][:CHECKED_BATCHES]


@torch.no_grad()
def logits(task: Task, model: nn.Module, batches: list[Batch]) -> list[Tensor]:
    """The model's logits with dropout off."""
    model.eval()
    with precision(task.device, task.bf16):
        return [model(**to_device(batch, task.device)).logits for batch in batches]


def _evaluate(task: Task, one: Contender, label: str, bars: Any) -> Scores:
    bar = bars.add_task(label, total=len(task.test), extra="")
    scores = evaluate(one.model, task.test, task.bf16, on_batch=lambda batch, output: bars.advance(bar))
    accuracy = "" if scores.accuracy is None else f", accuracy {scores.accuracy:.1%}"
    bars.update(bar, extra=f"loss {scores.loss:.3f}{accuracy}")
    return scores


def _numbers(scores: Scores) -> dict[str, float | None]:
    return {name: value for name, value in vars(scores).items() if name != "logits"}


def _run(one: Contender, train: list[Batch], scores: Scores) -> dict[str, Any]:
    ordered = sorted(one.seconds)
    return {
        **_numbers(scores),
        "train_losses": one.losses,
        "step_seconds": one.seconds,
        "step_seconds_median": ordered[len(ordered) // 2],
        "train_seconds": sum(one.seconds),
        "rows_per_second": sum(len(batch["labels"]) for batch in train) / sum(one.seconds),
        "tokens_per_second": sum(int(batch["attention_mask"].sum()) for batch in train) / sum(one.seconds),
    }
