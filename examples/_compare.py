"""The comparison both examples make: one start, two runs in turn (plain PEFT, accelerated), one adapter file."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from torch import Tensor, nn

import fastpeft
from _cli import machine, progress
from _data import Batch
from _measure import (
    Contender,
    Scores,
    compare_losses,
    evaluate,
    kept_for_backward,
    peak_of_step,
    precision,
    time_ratio,
    to_device,
    train_side_by_side,
)

CHECKED_BATCHES = 4  # of the test set, on which the reloaded adapter's logits are compared


@dataclass(frozen=True)
class Task:
    """What is trained on what."""

    name: str
    build: Callable[[], nn.Module]  # the frozen model in fp32 on the CPU; the same weights at each call
    lora: peft.LoraConfig
    train: list[Batch]
    test: list[Batch]
    learning_rate: float
    bf16: bool
    device: torch.device
    seed: int
    output: Path


def compare(task: Task, out: Console, before: Scores | None = None) -> tuple[dict[str, Any], nn.Module]:
    """Trains both, measures both, saves and reloads the accelerated run's adapter.

    before: the frozen model's scores, where the caller has them (a new adapter changes nothing); measured otherwise.
    Returns the summary (plain numbers, ready for JSON) and the trained model, restored to plain PEFT. Both models start
    from one set of weights: the second is a copy of the first.
    """
    torch.manual_seed(task.seed)
    model = peft.get_peft_model(task.build(), task.lora).to(task.device)
    plain, ours = Contender("plain PEFT", model), Contender("accelerated", copy.deepcopy(model))
    both = (plain, ours)
    report = fastpeft.accelerate(ours.model)
    out.print("\n[bold]fastpeft.accelerate(model)[/bold]")
    out.print(str(report), markup=False)
    trainable, total = model.get_nb_trainable_parameters()
    out.print(
        f"\n{trainable:,} of {total:,} weights are trained; {len(task.train)} steps each, in turn, on {task.device}\n"
    )

    widest = max(task.train, key=lambda batch: batch["input_ids"].numel())
    kept = {one.name: kept_for_backward(one.model, widest, task.bf16, task.seed) for one in both}
    peak = {one.name: peak_of_step(one.model, widest, task.bf16, task.seed) for one in both}
    with progress(out) as bars:
        before = before or _evaluate(task, plain, "test before", bars)
        bar = bars.add_task("train both in turn", total=len(task.train), extra="")

        def on_step(step: int) -> None:
            spread = [sum(one.losses[-25:]) / len(one.losses[-25:]) for one in both]
            bars.update(bar, advance=1, extra=f"loss {spread[0]:.3f} plain, {spread[1]:.3f} accelerated")

        train_side_by_side(
            both, task.train, learning_rate=task.learning_rate, bf16=task.bf16, seed=task.seed, on_step=on_step
        )
        after = {one.name: _evaluate(task, one, f"test {one.name}", bars) for one in both}

    summary: dict[str, Any] = {
        "task": task.name,
        "machine": machine(task.device),
        "settings": {
            "rank": task.lora.r,
            "alpha": task.lora.lora_alpha,
            "dropout": task.lora.lora_dropout,
            "learning_rate": task.learning_rate,
            "precision": "bf16 autocast" if task.bf16 else "fp32",
            "seed": task.seed,
            "steps": len(task.train),
            "batch": list(widest["input_ids"].shape),
        },
        "accelerate_report": str(report),
        "trainable": trainable,
        "parameters": total,
        "before": _numbers(before),
        "runs": {one.name: _run(one, task.train, after[one.name], kept[one.name], peak[one.name]) for one in both},
        "time_ratio": time_ratio(plain.seconds, ours.seconds),
        "loss_curves": compare_losses(plain.losses, ours.losses),
        "adapter": check_adapter(task, ours.model, task.output / "adapter"),
    }
    if (first := after[plain.name].logits) is not None:
        second = after[ours.name].logits
        summary["decided_differently"] = float((first.argmax(-1) != second.argmax(-1)).float().mean())
    return summary, ours.model


def check_adapter(task: Task, accelerated: nn.Module, folder: Path) -> dict[str, float | bool | int | str]:
    """Saves the trained adapter, then compares three models with the same weights, dropout off.

    accelerated (trained), restored (the same object after fastpeft.restore), reloaded (a fresh frozen model with the
    saved file, in PEFT, never touched by fastpeft). restored and reloaded must agree bit for bit; accelerated may
    differ from both by rounding, whose size is returned. Leaves the model restored.
    """
    batches = task.test[:: max(1, len(task.test) // CHECKED_BATCHES)][:CHECKED_BATCHES]
    accelerated.save_pretrained(folder)
    fast_logits, fast_grads = _logits(task, accelerated, batches), _gradients(task, accelerated, batches[-1])
    fastpeft.restore(accelerated)
    restored_logits, plain_grads = _logits(task, accelerated, batches), _gradients(task, accelerated, batches[-1])
    reloaded = peft.PeftModel.from_pretrained(task.build(), folder).to(task.device)
    reloaded_logits = _logits(task, reloaded, batches)
    gap = max(float((a - b).abs().max()) for a, b in zip(fast_logits, reloaded_logits, strict=True))
    return {
        "folder": str(folder),
        "rows_compared": sum(len(batch["labels"]) for batch in batches),
        "reloaded_equals_restored_bitwise": all(map(torch.equal, reloaded_logits, restored_logits)),
        "accelerated_equals_reloaded_bitwise": all(map(torch.equal, fast_logits, reloaded_logits)),
        "largest_logit_difference": gap,
        "largest_logit": max(float(a.abs().max()) for a in reloaded_logits),
        "largest_relative_gradient_difference": max(
            float((fast_grads[name] - grad).norm() / grad.norm().clamp_min(1e-30)) for name, grad in plain_grads.items()
        ),
    }


@torch.no_grad()
def _logits(task: Task, model: nn.Module, batches: list[Batch]) -> list[Tensor]:
    model.eval()
    with precision(task.device, task.bf16):
        return [model(**to_device(batch, task.device)).logits for batch in batches]


def _gradients(task: Task, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Every trained weight's gradient with dropout off, where both implementations compute the same function."""
    model.eval()
    model.zero_grad(set_to_none=True)
    with precision(task.device, task.bf16):
        loss = model(**to_device(batch, task.device)).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _evaluate(task: Task, one: Contender, label: str, bars: Any) -> Scores:
    bar = bars.add_task(label, total=len(task.test), extra="")
    scores = evaluate(one.model, task.test, task.bf16, on_batch=lambda batch, output: bars.advance(bar))
    accuracy = "" if scores.accuracy is None else f", accuracy {scores.accuracy:.1%}"
    bars.update(bar, extra=f"loss {scores.loss:.3f}{accuracy}")
    return scores


def _numbers(scores: Scores) -> dict[str, float | None]:
    return {name: value for name, value in asdict(scores).items() if name != "logits"}


def _run(one: Contender, train: list[Batch], scores: Scores, kept: int, peak: int | None) -> dict[str, Any]:
    ordered = sorted(one.seconds)
    return {
        **_numbers(scores),
        "train_losses": one.losses,
        "step_seconds": one.seconds,
        "step_seconds_median": ordered[len(ordered) // 2],
        "train_seconds": sum(one.seconds),
        "rows_per_second": sum(len(batch["labels"]) for batch in train) / sum(one.seconds),
        "tokens_per_second": sum(int(batch["attention_mask"].sum()) for batch in train) / sum(one.seconds),
        "kept_for_backward_bytes": kept,
        "peak_step_bytes": peak,
    }
