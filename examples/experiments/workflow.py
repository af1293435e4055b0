"""Pieces of a training run: checkpointing, mixed precision, shared adapters, a sweep; what each saves and changes.

    python examples/experiments/workflow.py

LoRA on all-MiniLM-L6-v2 and movie reviews by the manager, in its account of parameters; then one training step of

- gradient checkpointing: the gradients of the step without it, a fraction of the bytes kept for backward,
- mixed precision: autocast to bf16, and to fp16 with a scaled loss, adapters and optimizer in fp32,
- sharing: one A and B for the query and value of all layers (share_lora),

a few steps of training with all of them at once, and a small sweep over rank and learning rate.
"""

import itertools
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from _experiment import AFTER, BEFORE, OTHER, Experiment, Frozen, adamw, counts, options, run
from _reviews import Reviews, accuracy, predict, reviews, text_options
from fastpeft import EfficientFineTuningManager, share_lora
from fastpeft.cli.data import Batch
from fastpeft.cli.measure import kept_for_backward

TARGETS = ["query", "value"]


def adapted(task: Reviews, rank: int = 8, seed: int = 0) -> tuple[nn.Module, EfficientFineTuningManager]:
    """The model with LoRA, without dropout of any kind, so that steps can be compared."""
    model = task.build()
    torch.manual_seed(seed)
    manager = EfficientFineTuningManager(model)
    manager.apply_lora(TARGETS, rank=rank, alpha=2 * rank, dropout_probability=0.0, modules_to_save=["classifier"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for entry in manager.entries:  # lora_B starts at zero, and lora_A has no gradient then
        nn.init.normal_(entry.module.lora_B, std=0.01)
    return model.train(), manager


def gradients(model: nn.Module, batch: Batch, precision: AbstractContextManager[Any], scale: float = 1.0) -> Tensor:
    """All gradients of one step in one vector, fp32."""
    model.zero_grad(set_to_none=True)
    with precision:
        loss = model(**batch).loss
    (loss * scale).backward()
    return torch.cat([p.grad.flatten() / scale for p in model.parameters() if p.grad is not None])


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def checkpointing(task: Reviews, batch: Batch) -> dict[str, Any]:
    model, manager = adapted(task)
    plain, kept = gradients(model, batch, nullcontext()), kept_for_backward(model, lambda: model(**batch))
    manager.gradient_checkpointing_enable()
    less = kept_for_backward(model, lambda: model(**batch))
    return {
        "kept_bytes": kept,
        "kept_bytes_checkpointed": less,
        "gradient_difference": difference(gradients(model, batch, nullcontext()), plain),
    }


def mixed_precision(task: Reviews, batch: Batch) -> dict[str, Any]:
    model, _ = adapted(task)
    plain, kept = gradients(model, batch, nullcontext()), kept_for_backward(model, lambda: model(**batch))
    found: dict[str, Any] = {"kept_bytes": kept}
    for name, dtype, scale in (("bf16", torch.bfloat16, 1.0), ("fp16", torch.float16, 2.0**10)):

        def low(dtype: torch.dtype = dtype) -> AbstractContextManager[Any]:
            return torch.autocast("cpu", dtype=dtype)

        def forward(dtype: torch.dtype = dtype) -> None:
            with torch.autocast("cpu", dtype=dtype):
                model(**batch)

        found[f"kept_bytes_{name}"] = kept_for_backward(model, forward)
        found[f"gradient_difference_{name}"] = difference(gradients(model, batch, low(), scale), plain)
    own = {p.dtype for p in model.parameters() if p.requires_grad}
    return {**found, "adapters_stay_fp32": own == {torch.float32}}


def sharing(task: Reviews) -> dict[str, Any]:
    """The adapters of equal shape hold one A and B; the optimizer and the file do too."""
    model, manager = adapted(task)
    alone = counts(model)[0]
    share_lora([entry.module for entry in manager.entries])
    first, *others = (entry.module for entry in manager.entries)
    tied = all(each.lora_A is first.lora_A and each.lora_B is first.lora_B for each in others)
    return {"trainable": alone, "trainable_shared": counts(model)[0], "tied": tied}


def together(this: Experiment, task: Reviews, steps: int) -> dict[str, Any]:
    """Sharing, checkpointing and autocast with a GradScaler in one run; the file loads as what was saved, still shared.

    In bf16, whose range needs no scaler: a CPU's products in fp16 take forty times as long.
    """
    model, manager = adapted(task, seed=this.args.seed)
    share_lora([entry.module for entry in manager.entries])
    manager.gradient_checkpointing_enable()
    frozen, scaler = Frozen(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def loss(batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch).loss

    trace = this.train("all together", task.train[:steps], loss, adamw(model, 2e-3), scaler=scaler)
    kept, file = frozen.check(), this.folder / "shared.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    manager.save_efficient_weights(file)
    fresh = task.build()
    again = EfficientFineTuningManager(fresh)
    again.load_efficient_weights(file)
    model.eval()
    fresh.eval()
    with torch.no_grad():
        same = torch.equal(fresh(**task.test[0]).logits, model(**task.test[0]).logits)
    return {
        "steps": len(trace["losses"]),
        "frozen_values_bit_equal": kept,
        "trainable": counts(model)[0],
        "file_bytes": file.stat().st_size,
        "loaded_again_bit_equal": same,
        "shared_after_load": counts(fresh)[0] == counts(model)[0],
        **trace,
    }


def sweep(this: Experiment, task: Reviews, steps: int) -> list[dict[str, Any]]:
    """Rank by learning rate, a few steps each; the loss over the last quarter of them tells."""
    rows = []
    for rank, rate in itertools.product((2, 8), (3e-4, 1e-3, 3e-3)):
        model, _ = adapted(task, rank, this.args.seed)
        trace = this.train(
            f"r {rank}, rate {rate:g}",
            task.train[:steps],
            lambda b, m=model: m(**b).loss,
            adamw(model, rate),
            bf16=True,
        )
        tail = trace["losses"][-max(1, steps // 4) :]
        rows.append({"rank": rank, "learning_rate": rate, "trainable": counts(model)[0], "loss": sum(tail) / len(tail)})
    return rows


def workflow(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    text_options(parser)
    parser.add_argument("--steps", type=int, default=30, help="of the run with everything and of each of the sweep")
    args = parser.parse_args(arguments)
    this, task = Experiment("workflow", args), reviews(args)
    steps = 3 if args.quick else args.steps
    widest = max(task.train, key=lambda each: each["input_ids"].numel())
    batch = {name: tensor[:8] for name, tensor in widest.items()}
    model, manager = adapted(task)
    this.out.print(manager.summary(), markup=False)
    before = accuracy(predict(this, "before", model, task.test[::4], False), task.test[::4])
    found: dict[str, Any] = {
        "accuracy_before": before,
        "checkpointing": checkpointing(task, batch),
        "mixed_precision": mixed_precision(task, batch),
        "sharing": sharing(task),
        "together": together(this, task, steps),
        "sweep": sweep(this, task, steps),
    }
    show(this, found)


def show(this: Experiment, found: dict[str, Any]) -> None:
    """One line a piece, the sweep as a table, the bytes and the sweep as plots."""
    saved, mixed, shared, whole = (found[name] for name in ("checkpointing", "mixed_precision", "sharing", "together"))
    kept = {
        "fp32": saved["kept_bytes"],
        "checkpointed": saved["kept_bytes_checkpointed"],
        "bf16": mixed["kept_bytes_bf16"],
        "fp16": mixed["kept_bytes_fp16"],
    }
    this.table(
        "A short sweep",
        ["rank", "learning rate", "trained", "loss, last quarter"],
        [[r["rank"], f"{r['learning_rate']:g}", f"{r['trainable']:,}", f"{r['loss']:.4f}"] for r in found["sweep"]],
    )
    this.say("Kept for backward: " + ", ".join(f"{name} {value / 1e6:.1f} MB" for name, value in kept.items()) + ".")
    this.say(
        f"Gradients beside fp32's: checkpointed {saved['gradient_difference']:.1e}, bf16 "
        f"{mixed['gradient_difference_bf16']:.1e}, fp16 scaled {mixed['gradient_difference_fp16']:.1e} (relative norm)."
    )
    this.say(f"Sharing: {shared['trainable']:,} trained parameters become {shared['trainable_shared']:,}.")
    same = "equal bit for bit" if whole["loaded_again_bit_equal"] else "NOT EQUAL"
    this.say(
        f"Shared, checkpointed and bf16 with a GradScaler, {whole['steps']} steps: loss {whole['losses'][0]:.3f} -> "
        f"{whole['losses'][-1]:.3f}; a file of {whole['file_bytes']:,} bytes; loaded again, logits {same}."
    )

    def draw(figure: Any) -> None:
        bars, curves = figure.subplots(1, 2)
        bars.bar_label(bars.bar(list(kept), [value / 1e6 for value in kept.values()], color=AFTER), fmt="%.0f")
        bars.set(ylabel="kept for backward [MB]")
        for rank, colour in zip(sorted({row["rank"] for row in found["sweep"]}), (BEFORE, OTHER), strict=False):
            rows = [row for row in found["sweep"] if row["rank"] == rank]
            curves.plot(
                [r["learning_rate"] for r in rows], [r["loss"] for r in rows], "o-", color=colour, label=f"rank {rank}"
            )
        curves.set(xscale="log", xlabel="learning rate", ylabel="training loss, last quarter [nats]")
        curves.legend()

    this.finish(found, draw, figsize=(8, 3.5))


if __name__ == "__main__":
    sys.exit(run(workflow))
