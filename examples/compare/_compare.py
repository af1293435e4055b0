"""The comparison of plain PEFT with the same model accelerated: one start, two runs in turn, one adapter file."""

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from torch import Tensor, nn

import fastpeft
from _measure import Contender, Scores
from _training import Task, checked_batches, logits, side_by_side
from fastpeft.cli.data import Batch
from fastpeft.cli.measure import precision, to_device


def compare(task: Task, out: Console, before: Scores | None = None) -> tuple[dict[str, Any], nn.Module]:
    """Trains both, measures both, saves and reloads the accelerated run's adapter.

    before: as in side_by_side. Returns the summary and the trained model, restored to plain PEFT. Both models start
    from one set of weights: the second is a copy of the first.
    """
    torch.manual_seed(task.seed)
    config = peft.LoraConfig(
        task_type=task.kind,
        r=task.lora.rank,
        lora_alpha=task.lora.alpha,
        lora_dropout=task.lora.dropout,
        target_modules="all-linear",
    )
    model = peft.get_peft_model(task.build(), config).to(task.device)
    plain, ours = Contender("plain PEFT", model), Contender("accelerated", copy.deepcopy(model))
    report = fastpeft.accelerate(ours.model)
    out.print("\n[bold]fastpeft.accelerate(model)[/bold]")
    out.print(str(report), markup=False)
    summary = side_by_side(task, (plain, ours), out, before)
    summary["accelerate_report"] = str(report)
    summary["adapter"] = check_adapter(task, ours.model, task.output / "adapter")
    return summary, ours.model


def check_adapter(task: Task, accelerated: nn.Module, folder: Path) -> dict[str, float | bool | int | str]:
    """Saves the trained adapter, then compares three models with the same weights, dropout off.

    accelerated (trained), restored (the same object after fastpeft.restore), reloaded (a fresh frozen model with the
    saved file, in PEFT, never touched by fastpeft). restored and reloaded must agree bit for bit; accelerated may
    differ from both by rounding, whose size is returned. Leaves the model restored.
    """
    batches = checked_batches(task)
    accelerated.save_pretrained(folder)
    fast_logits, fast_grads = logits(task, accelerated, batches), _gradients(task, accelerated, batches[-1])
    fastpeft.restore(accelerated)
    restored_logits, plain_grads = logits(task, accelerated, batches), _gradients(task, accelerated, batches[-1])
    reloaded = peft.PeftModel.from_pretrained(task.build(), folder).to(task.device)
    reloaded_logits = logits(task, reloaded, batches)
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
