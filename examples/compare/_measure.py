"""What is measured of two models that train side by side: time of a step, bytes kept for backward, loss, accuracy."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.cli import measure
from fastpeft.cli.data import Batch
from fastpeft.cli.measure import precision, synchronize, to_device

WARM_UP = 5  # first steps, left out of the times: allocator, thread pool, on a GPU the compilation of kernels


@dataclass
class Contender:
    """One of the models that train side by side, and what was seen of it."""

    name: str
    model: nn.Module
    losses: list[float] = field(default_factory=list)  # one a step, in nats
    seconds: list[float] = field(default_factory=list)  # one a step: zero_grad, forward, backward, optimiser


@dataclass(frozen=True)
class Scores:
    loss: float  # mean over rows, nats
    accuracy: float | None  # share of rows, None for a language model
    logits: Tensor | None  # fp32 [rows, classes] on the CPU, None for a language model


def train_side_by_side(
    contenders: Sequence[Contender],
    batches: Sequence[Batch],
    *,
    learning_rate: float,
    bf16: bool,
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains all contenders on the same batches, one step each in turn, AdamW with the rate falling linearly to zero.

    Taking turns is what makes the ratio of the times fair: whatever else the machine does hits both alike, and so does
    a batch that is longer than others. The order swaps each step, so that none always finds the caches warm. Each step
    of each contender starts from the same seed: without dropout in LoRA, dropout of the frozen model draws the same
    masks in both.
    """
    device = next(contenders[0].model.parameters()).device
    optimizers, schedules = {}, {}
    for one in contenders:
        one.model.train()
        optimizers[one.name] = torch.optim.AdamW(
            (p for p in one.model.parameters() if p.requires_grad), lr=learning_rate
        )
        schedules[one.name] = torch.optim.lr_scheduler.LambdaLR(
            optimizers[one.name], lambda step: 1 - step / len(batches)
        )
    for step, cpu_batch in enumerate(batches):
        batch = to_device(cpu_batch, device)
        for one in contenders if step % 2 == 0 else reversed(contenders):
            torch.manual_seed(seed + step)
            synchronize(device)
            start = time.perf_counter()
            optimizers[one.name].zero_grad(set_to_none=True)
            with precision(device, bf16):
                loss = one.model(**batch).loss
            loss.backward()
            optimizers[one.name].step()
            synchronize(device)
            one.seconds.append(time.perf_counter() - start)
            schedules[one.name].step()
            one.losses.append(loss.item())
            if not math.isfinite(one.losses[-1]):
                raise FloatingPointError(f"{one.name}: loss must be finite, got {one.losses[-1]} at step {step}")
        on_step(step)


def kept_for_backward(model: nn.Module, batch: Batch, bf16: bool, seed: int) -> int:
    """Bytes that autograd holds between forward and backward of one training step, beyond weights and buffers."""
    device = next(model.parameters()).device
    model.train()
    torch.manual_seed(seed)
    with precision(device, bf16):
        return measure.kept_for_backward(model, lambda: model(**to_device(batch, device)))


def peak_of_step(model: nn.Module, batch: Batch, bf16: bool, seed: int) -> int | None:
    """CUDA only: the allocator's peak of one forward and backward, beyond what was allocated before; None elsewhere."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return None
    batch = to_device(batch, device)
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)

    def step() -> None:
        with precision(device, bf16):
            loss = model(**batch).loss
        loss.backward()

    peak = measure.peak_allocated(device, step)
    model.zero_grad(set_to_none=True)
    return peak


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    bf16: bool,
    *,
    on_batch: Callable[[Batch, Any], None] = lambda batch, output: None,
    **options: bool,
) -> Scores:
    """Mean loss, and for a classifier the accuracy and all logits, in eval mode.

    on_batch is shown each batch and the model's output; `options` go to the model's forward.
    """
    device = next(model.parameters()).device
    model.eval()
    rows, loss, right, logits = 0, 0.0, 0, []
    for cpu_batch in batches:
        batch = to_device(cpu_batch, device)
        with precision(device, bf16):
            output = model(**batch, **options)
        size = len(batch["labels"])
        rows += size
        loss += output.loss.item() * size
        if output.logits.dim() == 2:
            logits.append(output.logits.float().cpu())
            right += int((logits[-1].argmax(-1) == cpu_batch["labels"]).sum())
        on_batch(batch, output)
    return Scores(loss / rows, right / rows if logits else None, torch.cat(logits) if logits else None)


def smoothed(values: Sequence[float], window: int = 25) -> list[float]:
    """Running mean of `window` values; shorter by window - 1. All values at once where there are fewer."""
    window = min(window, len(values))
    return [statistics.fmean(values[i : i + window]) for i in range(len(values) - window + 1)]


def compare_losses(plain: Sequence[float], ours: Sequence[float], window: int = 25) -> dict[str, float | int]:
    """Do two loss curves over the same batches tell the same story?

    largest_smoothed_difference: of the running means over `window` steps, the step of the largest gap, in nats.
    mean_difference, standard_error: ours - plain, paired by step. Neighbouring steps are not independent, so the error
    is taken over the means of twelve consecutive parts of the run.
    largest_step_difference: of single steps, no smoothing; rounding alone when no dropout mask differs.
    """
    gaps = [b - a for a, b in zip(plain, ours, strict=True)]
    size = max(1, len(gaps) // 12)
    parts = [statistics.fmean(gaps[i : i + size]) for i in range(0, len(gaps) - size + 1, size)]
    error = statistics.stdev(parts) / math.sqrt(len(parts)) if len(parts) > 1 else 0.0
    pairs = zip(smoothed(plain, window), smoothed(ours, window), strict=True)
    return {
        "window": min(window, len(gaps)),
        "largest_smoothed_difference": max(abs(b - a) for a, b in pairs),
        "mean_difference": statistics.fmean(gaps),
        "standard_error": error,
        "largest_step_difference": max(map(abs, gaps)),
    }


def time_ratio(plain: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """ours / plain, paired by step, so by batch: median and quartiles, the warm-up left out."""
    skip = WARM_UP if len(plain) > 2 * WARM_UP else 0
    ratios = [b / a for a, b in zip(plain[skip:], ours[skip:], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high, "steps_left_out": skip}
