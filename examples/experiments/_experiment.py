"""What the experiments share: options, training, the proof that frozen weights stay, and the files left behind."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.table import Table
from torch import Tensor, nn

from fastpeft.cli.assets import AssetError
from fastpeft.cli.console import console, machine, progress
from fastpeft.cli.measure import precision

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt

BEFORE, AFTER, OTHER = "#9aa5b1", "#1d6996", "#b0413e"  # colours of every plot


def options(description: str) -> argparse.ArgumentParser:
    """The options that every experiment has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny data and models, nothing fetched: for tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of the CPU; None: as many as torch takes")
    parser.add_argument("--cache", type=Path, help="folder of fetched files; None: $FASTPEFT_CACHE or the user's cache")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="a folder in it holds the results")
    return parser


class Experiment:
    """One run: where it prints, its clocks, its folder."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        if args.threads:
            torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        self.name, self.args, self.out = name, args, console()
        self.folder: Path = args.output / name
        self.began, self.began_cpu = time.perf_counter(), time.process_time()

    def train(
        self,
        what: str,
        batches: Sequence[Any],
        loss: Callable[[Any], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        decay: bool = True,
        bf16: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        after_step: Callable[[int], None] = lambda step: None,
    ) -> dict[str, Any]:
        """One step a batch under a progress bar; losses, wall and CPU seconds.

        decay         the learning rate falls linearly to zero
        after_step    is called between ``optimizer.step()`` and the next ``zero_grad()``, with the step from 1
        """
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches) if decay else 1)
        losses: list[float] = []
        wall, cpu = time.perf_counter(), time.process_time()
        with progress(self.out) as bars:
            bar = bars.add_task(what, total=len(batches), extra="")
            for step, batch in enumerate(batches, 1):
                optimizer.zero_grad(set_to_none=True)
                with precision(torch.device("cpu"), bf16):
                    value = loss(batch)
                if scaler is None:
                    value.backward()
                    optimizer.step()
                else:
                    scaler.scale(value).backward()
                    scaler.step(optimizer)
                    scaler.update()
                losses.append(value.item())
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(f"{what}: loss must be finite, got {losses[-1]} at step {step}")
                after_step(step)
                schedule.step()
                bars.update(bar, advance=1, extra=f"loss {sum(losses[-25:]) / len(losses[-25:]):.3f}")
        return {"losses": losses, "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Leaves a method's result in the folder, so that methods may be run one by one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"method-{name}.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")

    def kept(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The results that are there, of this run and of earlier ones."""
        found = {name: self.folder / f"method-{name}.json" for name in names}
        return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in found.items() if file.is_file()}

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Prints a table: the first column to the left, figures to the right."""
        table = Table(title=title)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*map(str, row))
        self.out.print(table)

    def say(self, line: str) -> None:
        self.out.print("- " + line, markup=False, soft_wrap=True)

    def finish(self, results: dict[str, Any], draw: Callable[[Any], None], **size: Any) -> None:
        """Writes the results as JSON, the plot beside them, and says where.

        draw     gets ``plt.subplots``'s figure
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {
            "experiment": self.name,
            "quick": self.args.quick,
            "seed": self.args.seed,
            "machine": machine(torch.device("cpu")),
            "seconds": time.perf_counter() - self.began,
            "cpu_seconds": time.process_time() - self.began_cpu,
            **results,
        }
        (self.folder / "result.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        figure = plt.figure(layout="constrained", **size)
        draw(figure)
        figure.savefig(self.folder / "result.png", dpi=100)
        plt.close(figure)
        self.say(
            f"{whole['seconds']:.0f} s in all, {whole['cpu_seconds']:.0f} s of the CPU. "
            f"Written to {self.folder}: result.json, result.png"
        )


class Frozen:
    """What training must not change: a model's frozen parameters as they are now, to the bit.

    buffers    the model's buffers too, as the averages of batch normalisation
    """

    def __init__(self, model: nn.Module, buffers: bool = False) -> None:
        held: list[tuple[str, Tensor]] = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        held += list(model.named_buffers()) if buffers else []
        self.held = [(name, tensor, tensor.detach().clone()) for name, tensor in held]

    def check(self) -> int:
        """How many values there are. Raises RuntimeError: one has changed."""
        changed = [name for name, now, then in self.held if not torch.equal(now, then)]
        if changed:
            raise RuntimeError(f"frozen weights must keep every bit, got others in {changed}")
        return sum(then.numel() for _, _, then in self.held)


def counts(model: nn.Module) -> tuple[int, int]:
    """Trained parameters and all of them, each counted once."""
    every = list(model.parameters())
    return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate)


def drawn_batches(rows: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """`steps` batches of row numbers, each row once before any twice."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // rows)
    order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(epochs)])
    return list(order[: steps * batch_size].split(batch_size))


def run(experiment: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None = None) -> int:
    """The experiment, and what it could not fetch as a message instead of a traceback; the exit status."""
    try:
        experiment(arguments)
    except AssetError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
