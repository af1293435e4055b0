"""Fine-tunes SmolLM2-135M on Shakespeare with QLoRA, its frozen weights in 4 bits, beside LoRA over them as they are.

    python examples/compare/finetune_qlora.py    # 20 steps; CPU or, where there is one, the CUDA GPU
    python examples/compare/finetune_qlora.py --bf16    # the frozen weights and the arithmetic in bf16
    python examples/compare/finetune_qlora.py --model some/causal-lm --data my_text.txt

fastpeft alone: a QLoRALinear takes the place of every linear layer but the head, with no PEFT and no bitsandbytes. Both
runs start from the same adapter and see the same batches and the same dropout masks: 4 bits are all they differ in.
Writes adapter.safetensors, summary.json and comparison.png to --output.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

import _cli
from _measure import Contender, train_side_by_side
from _outputs import claims_of_cost, save, show
from _smollm2 import make_task
from _training import Lora, Task, checked_batches, logits, side_by_side
from fastpeft import LoRALinear, QLoRALinear
from fastpeft.cli import assets
from fastpeft.cli.measure import forget_peak, peak_resident

ALONE_STEPS = 3  # of a process whose memory is measured
RUNS = {"LoRA": LoRALinear, "QLoRA": QLoRALinear}


def adapt(model: nn.Module, layer: type[LoRALinear] | type[QLoRALinear], lora: Lora, seed: int) -> nn.Module:
    """Freezes `model` and puts a `layer` in the place of every linear layer but the head; the same factors by seed."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    torch.manual_seed(seed)
    found = [name for name, one in model.named_modules() if type(one) is nn.Linear and one is not head]
    for name in found:
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        adapted = layer.from_linear(getattr(holder, child), rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout)
        setattr(holder, child, adapted)
    return model


def make(task: Task, name: str) -> nn.Module:
    """The model of the run of that name, untrained."""
    model = task.build()
    for parameter in model.parameters():  # out of the mapped file, which stays in memory whole while one is in it
        parameter.data = parameter.data.clone()
    return adapt(model, RUNS[name], task.lora, task.seed).to(task.device)


def frozen_weights(model: nn.Module) -> tuple[int, int]:
    """(elements, bytes) of the base weights of the adapted layers, scales included."""
    elements = size = 0
    for one in model.modules():
        if isinstance(one, (LoRALinear, QLoRALinear)):
            elements += one.in_features * one.out_features
            size += one.weight_4bit().nbytes if isinstance(one, QLoRALinear) else one.weight.nbytes
    return elements, size


def save_adapter(model: nn.Module, file: Path) -> None:
    """The trained weights and nothing else, by their names in the model."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}, file)


def load_adapter(model: nn.Module, file: Path) -> nn.Module:
    """Puts a saved adapter into an adapted model. Raises ValueError: the file is of another adapter."""
    found = model.load_state_dict(load_file(file), strict=False)
    missing = [name for name in found.missing_keys if name.rpartition(".")[2].startswith("lora_")]
    if missing or found.unexpected_keys:
        raise ValueError(f"{file}: names must be those of the adapter, got {missing + found.unexpected_keys}")
    return model


def check_adapter(task: Task, trained: nn.Module, file: Path) -> dict[str, Any]:
    """Saves, loads into a model quantised anew, and compares the logits with dropout off."""
    save_adapter(trained, file)
    batches = checked_batches(task)
    reloaded = logits(task, load_adapter(make(task, "QLoRA"), file), batches)
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "rows_compared": sum(len(batch["labels"]) for batch in batches),
        "reloaded_equals_trained_bitwise": all(map(torch.equal, reloaded, logits(task, trained, batches))),
    }


def train_alone(task: Task, name: str) -> int | None:
    """Builds one of the two, trains it a few steps; the peak of this process's memory during them, in bytes."""
    one = Contender(name, make(task, name))
    forget_peak()
    train_side_by_side(
        [one], task.train[:ALONE_STEPS], learning_rate=task.learning_rate, bf16=task.bf16, seed=task.seed
    )
    return peak_resident()


def resident_alone(arguments: list[str], name: str) -> int | None:
    """train_alone in a process of its own, where nothing else is resident but Python and torch."""
    command = [sys.executable, __file__, *arguments, "--alone", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status must be 0, got {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def claims(summary: dict[str, Any]) -> Iterator[str]:
    """What the table's numbers mean, a sentence each."""
    yield from claims_of_cost(summary)
    plain, ours = summary["runs"].values()
    elements, adapter, curves = summary["frozen_elements"], summary["adapter"], summary["loss_curves"]
    yield (
        f"Frozen weights of the adapted layers, {elements:,} elements: {plain['frozen_bytes'] / 1e6:.1f} MB as loaded, "
        f"{2 * elements / 1e6:.1f} MB in 16 bits, {ours['frozen_bytes'] / 1e6:.1f} MB in 4 "
        f"({8 * ours['frozen_bytes'] / elements:.2f} bits an element, scales included)."
    )
    cost = ours["before"]["loss"] - plain["before"]["loss"]
    yield (
        f"Test loss in 4 bits against the weights as loaded: {cost:+.3f} nats before training, "
        f"{ours['loss'] - plain['loss']:+.3f} after it; training loss {curves['mean_difference']:+.3f} in the mean."
    )
    same = "are" if adapter["reloaded_equals_trained_bitwise"] else "are NOT"
    yield (
        f"Adapter saved to {adapter['file']} ({adapter['bytes'] / 1e6:.1f} MB) and loaded over weights quantised anew: "
        f"its logits {same} bit for bit those of the trained model ({adapter['rows_compared']} rows)."
    )


def run(task: Task, out: Console, resident: Callable[[str], int | None] = lambda name: None) -> dict[str, Any]:
    """The whole example on one task; returns what it wrote to summary.json.

    resident: peak memory of a process that trains the run of that name alone.
    """
    start = time.perf_counter()
    peaks = {}
    for name in RUNS:
        with out.status(f"memory of a process that trains {name} alone"):
            peaks[name] = resident(name)
    both = [Contender(name, make(task, name)) for name in RUNS]
    summary = side_by_side(task, both, out, same_start=False)
    for one in both:
        summary["frozen_elements"], frozen = frozen_weights(one.model)
        summary["runs"][one.name] |= {"frozen_bytes": frozen, "resident_bytes": peaks[one.name]}
    summary["adapter"] = check_adapter(task, both[1].model, task.output / "adapter.safetensors")
    summary["wall_seconds"] = time.perf_counter() - start
    show(summary, out, claims(summary))
    numbers, picture = save(summary, task.output)
    out.print(
        f"\nWrote {numbers}, {picture} and {summary['adapter']['file']} in {summary['wall_seconds']:.0f} s.",
        soft_wrap=True,
    )
    return summary


def main(arguments: list[str] | None = None) -> int:
    options = _cli.parser(__doc__.splitlines()[0], batch_size=4, max_length=128, learning_rate=1e-3)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument(
        "--alone", choices=list(RUNS), help="only print the peak memory of this process while it trains that run"
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    args = options.parse_args(arguments)
    out = _cli.prepare(args)
    try:
        task, _ = make_task(args, torch.bfloat16 if args.bf16 else torch.float32)
    except (assets.AssetError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if args.alone:
        print(json.dumps(train_alone(task, args.alone)))
        return 0
    run(task, out, lambda name: resident_alone(arguments, name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
