"""A model with a method in it, and what some methods do beyond a step: budgets, pruning."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastpeft.cli.compare.task import Task
from fastpeft.nn import AdaLoRALinear, PruningAwareLoRALinear, RankAllocator, SparseLoRALinear


@dataclass
class Adapted:
    """A model with a method in it.

    after_step after_step(step), called before gradients are cleared: runs a schedule
    penalty    added to the loss
    about      in words, what training made of the adapter
    """

    model: nn.Module
    after_step: Callable[[int], object] = lambda step: None
    penalty: Callable[[], Tensor] | None = None
    about: Callable[[], str] = lambda: ""


def adalora(model: nn.Module, target_rank: int, orthogonality: float, steps: int) -> Adapted:
    """AdaLoRA whose rank budget falls from one tenth to seven tenths of the training and then stays."""
    allocator = RankAllocator(
        model, target_rank=target_rank, tinit=steps // 10, tfinal=max(1, steps * 3 // 10), delta_t=max(1, steps // 50),
        total_step=max(steps, 2),
    )  # fmt: skip

    def penalty() -> Tensor:
        loss: Tensor = orthogonality * allocator.orthogonality_loss()
        return loss

    def about() -> str:
        ranks = [layer.get_effective_rank() for layer in model.modules() if isinstance(layer, AdaLoRALinear)]
        return f"ranks {min(ranks)} to {max(ranks)}, mean {statistics.fmean(ranks):.1f}"

    return Adapted(model, after_step=allocator.update, penalty=penalty, about=about)


def pruned(model: nn.Module, rate: float, steps: int) -> Adapted:
    """Prune twenty times between one fifth and four fifths of the training, with rates along a cubic curve.

    Source     Zhu and Gupta 2017, arXiv:1710.01878, eq. 1
    """
    start, end = steps // 5, max(steps * 4 // 5, 1)
    every = max(1, (end - start) // 20)

    def after_step(step: int) -> None:
        if step < start or step > end or ((step - start) % every and step != end):
            return
        left = 1 - (step - start) / max(1, end - start)
        for layer in model.modules():
            if isinstance(layer, PruningAwareLoRALinear):
                layer.prune(rate * (1 - left**3))

    return Adapted(model, after_step=after_step, about=lambda: sparsity(model))


def sparsity(model: nn.Module) -> str:
    """The share of zeros in the factors."""
    kinds = (SparseLoRALinear, PruningAwareLoRALinear)
    shares = [layer.sparsity for layer in model.modules() if isinstance(layer, kinds)]
    return f"{statistics.fmean(shares):.0%} of the factors are zero"


def peft_lora(model: nn.Module, task: Task, options: dict[str, Any]) -> nn.Module:
    """PEFT's LoRA on the same layers. Raises ImportError: PEFT is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("compare: peft must be installed for peft-lora; pip install fastpeft[peft]") from error
    config = peft.LoraConfig(
        task_type=task.kind,
        r=options["rank"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout_probability"],
        target_modules=task.names(model),
        modules_to_save=list(task.head) or None,
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted
