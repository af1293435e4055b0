"""``fastpeft compare``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastpeft.cli.assets import AssetError, sha256
from fastpeft.cli.compare import costs, grid
from fastpeft.cli.compare.builtin import TASKS
from fastpeft.cli.compare.methods import METHODS
from fastpeft.cli.compare.record import Record, read, run_key, write
from fastpeft.cli.compare.task import Task, own
from fastpeft.cli.compare.training import Precision, train

Points = Mapping[str, tuple[str, dict[str, Any]]]
DTYPES = ("float32", "bfloat16")


class _Parser(argparse.ArgumentParser):
    """argparse's parser, which also suggests the option nearest to an unknown one."""

    def error(self, message: str) -> NoReturn:
        unknown = [word for word in message.split() if word.startswith("--")]
        if unknown and message.startswith("unrecognized"):
            message += grid.nearest(unknown[0].partition("=")[0], self._option_string_actions)
        super().error(message)


def _about(name: str) -> str:
    method = METHODS[name]
    others = ", ".join(f"{key}={'...' if value is None else value}" for key, value in method.options.items())
    return f"  {name:22} lr={method.rate:g}: {method.why}" + (f"\n  {'':22} {others}" if others else "")


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        "fastpeft compare",
        description="Train fine-tuning methods side by side on one task: a table, plots, a JSON file. A second call\n"
        "with the same --out goes on where the first was stopped, and may name more methods, seeds and grid points.",
        epilog="methods, their learning rates and other options for --grid:\n" + "\n".join(map(_about, METHODS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--task", default="sentiment", help=f"{', '.join(TASKS)}, or FILE.py:FUNCTION that returns a Task")
    add("--methods", help="names with commas between; default: the task's own list")
    add("--grid", nargs="+", default=[], metavar="OPTION=V,V", help="rank=4,8,16 lr=1e-4,1e-3: all combinations")
    add("--seeds", type=int, default=3, help="seeds 0 to this, for data order, head and adapters; default 3")
    add("--steps", type=int, help="training steps; default: --epochs")
    add("--epochs", type=float, default=1.0, help="passes over the training rows; default 1")
    add("--batch-size", type=int, help="rows; default: the task's")
    add("--max-length", type=int, help="tokens of a row; default: the task's")
    add("--model", metavar="ID_OR_PATH", help="another model for transformers' from_pretrained")
    add("--data", type=Path, metavar="FILE", help="your own data: .tsv, .csv or .jsonl with text and label; or a text")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="of the frozen weights; what is trained is fp32, so that bfloat16 brings --autocast with it",
    )
    add("--autocast", action="store_true", help="products under bfloat16 autocast")
    add("--threads", type=int, help="of the CPU; default: as many as torch takes")
    add("--rounds", type=int, default=15, help="timed steps of each method; default 15")
    add("--retime", action="store_true", help="only measure memory and step time of the runs in --out anew")
    add("--no-plots", action="store_true", help="write no picture (matplotlib is then not needed)")
    add("--cache", type=Path, help="folder of fetched files; default: $FASTPEFT_CACHE or the user's cache")
    add("--out", type=Path, default=Path("compare_output"), help="folder for compare.json, .md, .png")
    return made


def check(args: argparse.Namespace) -> None:
    """Check what can be checked before anything is loaded. Raises ValueError, ImportError."""
    for name in ("seeds", "steps", "batch_size", "max_length", "threads", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"compare: --{name.replace('_', '-')} must be at least 1, got {value}")
    if not args.epochs > 0:
        raise ValueError(f"compare: --epochs must be above 0, got {args.epochs}")
    if ":" not in args.task:
        grid.known("--task", args.task, TASKS)
    if not args.no_plots and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("compare: plots need matplotlib; pip install fastpeft[compare], or pass --no-plots")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"compare: --device must be one that torch has here, got {args.device!r}: {reason}") from error
    if args.retime and not (args.out / "compare.json").is_file():
        raise ValueError(f"compare: --retime must find {args.out / 'compare.json'}, got none")


def settings(args: argparse.Namespace, task: Task, steps: int) -> dict[str, Any]:
    """Everything that a result depends on, besides method, options, seed and machine."""

    def rows(batches: list[dict[str, torch.Tensor]]) -> int:
        return sum(len(next(iter(batch.values()))) for batch in batches)

    epoch = task.train(0, 0)
    classes = [label for batch in task.test for label in batch.get("labels", torch.empty(0)).flatten().tolist()]
    floor = max(map(classes.count, set(classes))) / len(classes) if task.metric == "accuracy" and classes else None
    return {
        "task": args.task, "task_name": task.name, "model": args.model, "data": args.data and str(args.data),
        "data_sha256": args.data and sha256(args.data),
        "steps": steps, "batch_size": args.batch_size, "max_length": args.max_length, "dtype": args.dtype,
        "autocast": args.autocast, "device": args.device, "metric": task.metric, "higher": task.higher,
        "floor": floor, "head": list(task.head), "head_rate": task.head_rate,
        "batch_rows": len(next(iter(epoch[0].values()))), "train_rows": rows(epoch), "test_rows": rows(task.test),
    }  # fmt: skip


def run_all(
    task: Task, points: Points, seeds: list[int], steps: int, where: Precision, record: Record, out: Any
) -> None:
    """Run every (method, seed) that is not in the record yet: one seed for all methods, then the next seed."""
    from fastpeft.cli.console import progress

    total = len(seeds) * len(points)
    left = [(seed, key) for seed in seeds for key in points if not record.done(run_key(key, seed))]
    with progress(out) as bars:
        every = bars.add_task("runs", total=total, completed=total - len(left), extra="")
        for seed, key in left:
            name, options = points[key]
            bar = bars.add_task(f"{key}, seed {seed}"[:22], total=steps, extra="")
            losses: list[float] = []

            def on_step(step: int, loss: float, bar: Any = bar, losses: list[float] = losses) -> None:
                losses.append(loss)
                bars.update(bar, advance=1, extra=f"loss {sum(losses[-25:]) / len(losses[-25:]):.3f}")

            try:
                found = train(task, name, options, seed, steps, where, on_step)
                said = f"{task.metric} {found['metric']:.4f} in {found['seconds']:.0f} s"
            except Exception as error:  # a method that fails is a row of the table, the others go on
                first = str(error).strip().partition("\n")[0]
                found = {"method": name, "options": options, "seed": seed, "error": f"{type(error).__name__}: {first}"}
                said = f"failed: {found['error']}"
            record.add(run_key(key, seed), found)
            bars.remove_task(bar)
            bars.update(every, advance=1)
            bars.console.print(f"{run_key(key, seed)}: {said}", markup=False, soft_wrap=True)


def measure(task: Task, points: Points, steps: int, where: Precision, rounds: int, record: Record, out: Any) -> None:
    """Measure the costs of all points of the record together: their steps take turns."""
    from fastpeft.cli.console import progress

    with progress(out) as bars:
        bar = bars.add_task("steps in turn", total=rounds + costs.WARM_UP, extra="")
        record.data["costs"] = costs.measure(
            task, points, steps, where, rounds, lambda number: bars.update(bar, advance=1)
        )
    record.write()


def as_before(args: argparse.Namespace) -> None:
    """For ``--retime``: restore the options with which the runs in ``--out`` were made."""
    there = read(args.out / "compare.json")["settings"]
    for name in ("task", "model", "steps", "batch_size", "max_length", "dtype", "autocast", "device"):
        setattr(args, name, there[name])
    args.data = None if there["data"] is None else Path(there["data"])


def prepare(args: argparse.Namespace) -> tuple[Task, Points, list[int], int, Precision, Record]:
    """Refuse whatever must be refused here, before anything is trained.

    Raises     ValueError, OSError, ImportError, AssetError.
    """
    check(args)
    try:
        from fastpeft.cli.console import machine
    except ImportError as error:
        raise ImportError("compare: the table needs rich; pip install fastpeft[compare]") from error
    if args.retime:
        as_before(args)
    names = grid.methods(args.methods) if args.methods else None
    wanted = None if names is None else grid.points(names, grid.grid(args.grid, names))  # before data is read
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {"args": args, "model": args.model, "data": args.data}
    task = own(args.task, given) if ":" in args.task else TASKS[args.task](args)
    points = wanted or grid.points(task.methods, grid.grid(args.grid, task.methods))
    whole = max(1, round(args.epochs * len(task.train(0, 0))))
    steps = args.steps or (task.steps if args.epochs == 1.0 and task.steps else whole)
    where = Precision(torch.device(args.device), getattr(torch, args.dtype), args.autocast)
    args.out.mkdir(parents=True, exist_ok=True)
    record = Record(args.out / "compare.json", settings(args, task, steps))
    record.on(machine(where.device))
    return task, points, list(range(args.seeds)), steps, where, record


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve ``fastpeft compare``. Returns the exit status: 2 for invalid options, 1 if a method failed."""
    args = parser().parse_args(arguments)
    args.autocast = args.autocast or args.dtype == "bfloat16"
    try:
        task, points, seeds, steps, where, record = prepare(args)
    except (AssetError, ImportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    from fastpeft.cli.compare import report
    from fastpeft.cli.console import console

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    out = console()
    try:
        if not args.retime:
            run_all(task, points, seeds, steps, where, record, out)
    except KeyboardInterrupt:
        print(f"Stopped; every run that was done is in {record.file}, and the same command goes on.", file=sys.stderr)
        return 130
    trained = {key: point for key, point in record.points().items() if point[0] != "none"}
    if trained and (args.retime or trained.keys() - record.data["costs"].get("memory", {}).keys()):
        measure(task, trained, steps, where, args.rounds, record, out)
    # All points in the file, the requested ones first.
    points = record.points() if args.retime else {**points, **record.points()}
    seeds = record.seeds()
    report.show(record.data, points, seeds, out)
    write(args.out / "compare.md", report.markdown(record.data, points, seeds))
    written = ["compare.json", "compare.md"]
    if not args.no_plots:
        from fastpeft.cli.compare.plots import plot

        plot(record.data, points, seeds, args.out / "compare.png")
        written.append("compare.png")
    out.print(f"Wrote {', '.join(written)} to {args.out}.", soft_wrap=True)
    return int(any("error" in run for run in record.data["runs"].values()))
