"""all-MiniLM-L6-v2 on the polarity of movie reviews, by one of twelve methods: what each buys.

    python examples/experiments/sentiment.py                       # LoRA
    python examples/experiments/sentiment.py --method prefix
    python examples/experiments/sentiment.py --method all          # every one in turn; takes more than five minutes

One epoch of 252 steps for every method; the body is frozen, the head is trained along. Each method leaves its result
in the folder, and the table and the plot hold every one that is there, so that methods may be run one by one. `pattern`
asks SmolLM2, a language model, since MiniLM has no head that fills in words (see _pattern.py).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import _pattern
import fastpeft
from _experiment import AFTER, BEFORE, Experiment, Frozen, adamw, counts, options, run
from _reviews import Reviews, accuracy, predict, reviews, text_options
from fastpeft import EfficientFineTuningManager
from fastpeft.cli.measure import kept_for_backward

HEAD, ATTENTION = ["classifier"], ["query", "value"]
QUESTION = "Is this sentence of a movie review positive or negative, a good film or a bad one?"


@dataclass
class Tuning:
    """A method put into a model, and what its training needs beside the loss."""

    manager: EfficientFineTuningManager | None = None
    penalty: Callable[[], Tensor] | None = None
    after_step: Callable[[int], None] = lambda step: None
    optimizer: Callable[[torch.optim.Optimizer], Any] = lambda optimizer: None
    finish: Callable[[], str] = lambda: ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Method:
    """One way to adapt the model."""

    what: str
    learning_rate: float
    apply: Callable[[nn.Module, Reviews], Tuning]


def head(model: nn.Module, task: Reviews) -> Tuning:
    fastpeft.freeze_body(model, "classifier")
    return Tuning()


def lora(model: nn.Module, task: Reviews) -> Tuning:
    return Tuning(EfficientFineTuningManager(model).apply_lora(ATTENTION, rank=8, alpha=16, modules_to_save=HEAD))


def lora_all(model: nn.Module, task: Reviews) -> Tuning:
    return Tuning(EfficientFineTuningManager(model).apply_lora(rank=8, alpha=16, modules_to_save=HEAD))


def prompt(model: nn.Module, task: Reviews) -> Tuning:
    started = {"init": "text", "text": QUESTION, "tokenizer": task.tokenizer}
    return Tuning(EfficientFineTuningManager(model).apply_prompt_tuning(20, modules_to_save=HEAD, **started))


def p_tuning(model: nn.Module, task: Reviews) -> Tuning:
    return Tuning(EfficientFineTuningManager(model).apply_ptuning(20, modules_to_save=HEAD))


def prefix(model: nn.Module, task: Reviews) -> Tuning:
    started = {"init": "text", "text": QUESTION, "tokenizer": task.tokenizer}
    manager = EfficientFineTuningManager(model)
    return Tuning(manager.apply_prefix_tuning(prefix_length=20, modules_to_save=HEAD, **started))


def adapter(model: nn.Module, task: Reviews) -> Tuning:
    return Tuning(EfficientFineTuningManager(model).apply_adapter(bottleneck=24, modules_to_save=HEAD))


def adalora(model: nn.Module, task: Reviews) -> Tuning:
    """Twelve ranks a layer at first, four on average in the end, where they count most."""
    manager = EfficientFineTuningManager(model).apply_adalora(form="svd", rank=12, alpha=24, modules_to_save=HEAD)
    steps = len(task.train)
    schedule = {"tinit": steps // 10, "tfinal": steps // 3, "delta_t": max(1, steps // 50), "total_step": steps}
    allocator = fastpeft.RankAllocator(model, target_rank=4, init_rank=12, **schedule)

    def finish() -> str:
        kept = [sum(pattern) for pattern in allocator.rank_pattern().values()]
        for layer in manager.adalora_layers.values():
            layer.compact()
        return f"{sum(kept)} of {12 * len(kept)} ranks kept, {min(kept)} to {max(kept)} a layer"

    return Tuning(
        manager, lambda: 0.1 * allocator.orthogonality_loss(), lambda step: allocator.update(step), finish=finish
    )


def sparse(model: nn.Module, task: Reviews) -> Tuning:
    """Half of A and B masked, drawn at random once."""
    manager = EfficientFineTuningManager(model).apply_sparse_lora(
        ATTENTION, rank=8, sparsity=0.5, alpha=16, init="kaiming", modules_to_save=HEAD
    )
    return Tuning(
        manager,
        optimizer=lambda optimizer: fastpeft.remask_after(optimizer, model),
        finish=lambda: f"{share_of_zeros(manager):.1%} of A and B are zero",
    )


def pruned(model: nn.Module, task: Reviews) -> Tuning:
    """Rank 16; a quarter, a half, then three quarters of the ranks go on the way, and are cut out in the end."""
    manager = EfficientFineTuningManager(model).apply_pruning_lora(
        ATTENTION, rank=16, schedule=[0.25, 0.5, 0.75], score="product", alpha=32, init="kaiming", modules_to_save=HEAD
    )
    due = {len(task.train) * part // 10 for part in (4, 5, 6)}

    def after_step(step: int) -> None:
        if step in due:
            for entry in manager.entries:
                entry.module.prune()

    def finish() -> str:
        zeros, kept = share_of_zeros(manager), [entry.module.compact() for entry in manager.entries]
        return f"{zeros:.1%} zero, rank 16 became {min(kept)} to {max(kept)}"

    return Tuning(manager, after_step=after_step, finish=finish)


def share_of_zeros(manager: EfficientFineTuningManager) -> float:
    shares = [entry.module.sparsity for entry in manager.entries]
    return sum(shares) / len(shares)


METHODS = {
    "head": Method("head only", 5e-3, head),
    "lora": Method("LoRA r 8, q and v", 1e-3, lora),
    "lora-all": Method("LoRA r 8, all linear", 1e-3, lora_all),
    "prompt": Method("prompt tuning, 20 tokens from text", 1e-2, prompt),
    "p-tuning": Method("P-tuning, 20 tokens", 1e-3, p_tuning),
    "prefix": Method("prefix tuning, 20 tokens from text", 5e-3, prefix),
    "adapter": Method("adapters of Houlsby, bottleneck 24", 1e-3, adapter),
    "adalora": Method("AdaLoRA, all linear, r 12 to 4", 2e-3, adalora),
    "sparse": Method("sparse LoRA r 8, half masked", 1e-3, sparse),
    "pruned": Method("pruned LoRA r 16 to 4", 1e-3, pruned),
}


def tune(this: Experiment, task: Reviews, name: str) -> dict[str, Any]:
    """Builds, adapts, trains and tests one method; its row of the table."""
    method, model = METHODS[name], task.build()
    before = accuracy(predict(this, f"{name}: before", model, task.test, task.bf16), task.test)
    torch.manual_seed(this.args.seed)
    tuning = method.apply(model, task)
    (trained, total), frozen = counts(model), Frozen(model)
    widest = max(task.train, key=lambda batch: batch["input_ids"].numel())
    kept = kept_for_backward(model.train(), lambda: model(**widest))
    optimizer = adamw(model, this.args.learning_rate or method.learning_rate)
    tuning.optimizer(optimizer)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        value = model(**batch).loss
        return value if tuning.penalty is None else value + tuning.penalty()

    trace = this.train(name, task.train, loss, optimizer, bf16=task.bf16, after_step=tuning.after_step)
    unchanged, note = frozen.check(), tuning.finish()
    logits = predict(this, f"{name}: after", model, task.test, task.bf16)
    row = {
        "what": method.what,
        "trainable": trained,
        "trainable_after": counts(model)[0],
        "parameters": total,
        "frozen_values_bit_equal": unchanged,
        "accuracy_before": before,
        "accuracy": accuracy(logits, task.test),
        "kept_for_backward_bytes": kept,
        "note": note,
        **trace,
    }
    if tuning.manager is not None:
        row |= reload(this, task, name, tuning.manager, logits)
    return row


def reload(
    this: Experiment, task: Reviews, name: str, manager: EfficientFineTuningManager, logits: list[Tensor]
) -> dict[str, Any]:
    """The adapter saved, loaded into a fresh model and compared; and what the model says without it."""
    file = this.folder / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    manager.save_efficient_weights(file)
    fresh = task.build()
    EfficientFineTuningManager(fresh).load_efficient_weights(file)
    again = predict(this, f"{name}: loaded again", fresh, task.test[:4], task.bf16)
    return {
        "file_bytes": file.stat().st_size,
        "loaded_again_bit_equal": all(torch.equal(a, b) for a, b in zip(again, logits[:4], strict=True)),
    }


def sentiment(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    text_options(parser)
    parser.add_argument("--method", choices=[*METHODS, "pattern", "all"], default="lora")
    parser.add_argument("--learning-rate", type=float, help="None: the method's own")
    args: argparse.Namespace = parser.parse_args(arguments)
    this, names = Experiment("sentiment", args), [*METHODS, "pattern"] if args.method == "all" else [args.method]
    task = reviews(args)
    for name in names:
        this.keep(name, _pattern.tune(this, task) if name == "pattern" else tune(this, task, name))
    show(this, this.kept([*METHODS, "pattern"]))


def show(this: Experiment, rows: dict[str, dict[str, Any]]) -> None:
    """The table of every method that has been run, and the plot of what each buys."""
    this.table(
        f"Polarity of movie reviews, {'bf16 autocast' if this.args.bf16 else 'fp32'}",
        ["method", "trained", "left", "accuracy", "kept for backward", "training, CPU"],
        [
            [
                f"{name}: {row['what']}",
                f"{row['trainable']:,}",
                f"{row['trainable_after']:,}",
                f"{row['accuracy_before']:.1%} -> {row['accuracy']:.1%}",
                f"{row['kept_for_backward_bytes'] / 1e6:.0f} MB",
                f"{row['cpu_seconds']:.0f} s",
            ]
            for name, row in rows.items()
        ],
    )
    for name, row in rows.items():
        same = {True: "; saved and loaded again: logits equal bit for bit", False: "; LOADED AGAIN: OTHER LOGITS"}
        said = f"{row['note']}{same.get(row.get('loaded_again_bit_equal'), '')}".strip("; ")
        if said:
            this.say(f"{name}: {said}")

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for name, row in rows.items():
            axis.plot(row["trainable_after"], 100 * row["accuracy"], "o", color=AFTER)
            axis.annotate(name, (row["trainable_after"], 100 * row["accuracy"]), (5, 4), textcoords="offset points")
        first = next(iter(rows.values()))["accuracy_before"]
        axis.axhline(100 * first, color=BEFORE, linestyle="--", label="untrained head")
        axis.margins(x=0.15)
        axis.set(xscale="log", xlabel="parameters added, head included", ylabel="accuracy [%]")
        axis.legend()

    this.finish({"methods": rows}, draw, figsize=(7, 4.5))


if __name__ == "__main__":
    sys.exit(run(sentiment))
