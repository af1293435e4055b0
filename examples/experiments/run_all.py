"""Runs every experiment, each as its own command, and writes the table of what they gave and how long they took.

    python examples/experiments/run_all.py --write          # all 23 commands, then examples/README.md and its plots
    python examples/experiments/run_all.py --only digits speech
    python examples/experiments/run_all.py --missing        # what has no result in the folder yet

Times are taken from outside: wall, and CPU seconds of the command and its children. They say something on a quiet
machine alone. Run again, a command replaces its own row; the table holds every command that has a result.
"""

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- experiments: written by run_all.py -->", "<!-- end of the experiments -->"


@dataclass(frozen=True)
class Command:
    """One experiment, what of its result goes into the table, and what a peer reached on the same data."""

    name: str
    script: str
    arguments: tuple[str, ...]
    result: str  # below the output folder
    figure: Callable[[dict[str, Any]], str]
    peer: str = ""


def digits(got: dict[str, Any]) -> str:
    worst, errors, total = got["worst_digit"], got["errors"], got["total"]
    return (
        f"digit {worst}: {errors['before'][worst]} -> {errors['on'][worst]} errors of {got['images_of_it']}, all "
        f"digits {total['before']} -> {total['on']}; mixed {errors['mixed'][worst]} and {total['mixed']}; "
        f"disabled: bits {'equal' if got['disabled_logits_bit_equal'] else 'DIFFER'}"
    )


def accuracy(got: dict[str, Any]) -> str:
    return f"{got['accuracy_before']:.1%} -> {got['accuracy']:.1%}, {got['trainable_after']:,} parameters"


def loss(got: dict[str, Any]) -> str:
    return f"{got['loss_start']:.3f} -> {got['loss']:.3f}, {got['trainable']:,} parameters"


def methods(got: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row['accuracy']:.1%}" for name, row in got["methods"].items())


def fused(got: dict[str, Any]) -> str:
    return ", ".join(f"{name} {got['methods'][name]['accuracy']:.1%}" for name in ("head", "adapter", "fusion"))


def pieces(got: dict[str, Any]) -> str:
    saved, shared = got["checkpointing"], got["sharing"]
    less = saved["kept_bytes_checkpointed"] / saved["kept_bytes"]
    return (
        f"checkpointed: {less:.0%} of the bytes, gradients within {saved['gradient_difference']:.0e}; "
        f"shared: {shared['trainable']:,} -> {shared['trainable_shared']:,} parameters"
    )


SENTIMENT = {
    "head": "65.6 %",
    "lora": "84.0 %",
    "lora-all": "85.2 %",
    "prompt": "",
    "p-tuning": "",
    "prefix": "",
    "adapter": "",
    "adalora": "",
    "sparse": "",
    "pruned": "",
    "pattern": "",
}
LANGUAGE = {
    "prompt": "4.268 -> 3.825",
    "p-tuning-mlp": "4.509 -> 3.761",
    "p-tuning-lstm": "",
    "prefix": "",
    "prefix-random": "9.474 -> 5.023",
    "p-tuning-v2": "",
    "lora": "4.068 -> 3.654",
}
COMMANDS = [
    Command("digits", "digits.py", (), "digits/result.json", digits, "digit 6: 22 -> 0 of 113, all 81 -> 74"),
    *(
        Command(f"sentiment-{m}", "sentiment.py", ("--method", m), f"sentiment/method-{m}.json", accuracy, peer)
        for m, peer in SENTIMENT.items()
    ),
    *(
        Command(f"lm-{m}", "language_model.py", ("--method", m), f"language_model/method-{m}.json", loss, peer)
        for m, peer in LANGUAGE.items()
    ),
    Command("fusion", "fusion.py", (), "fusion/result.json", fused),
    Command("images", "images.py", (), "images/result.json", methods, "head 87.1 %, lora 90.4 %"),
    Command("speech", "speech.py", (), "speech/result.json", methods, "head 74.3 %, lora 91.1 %"),
    Command("workflow", "workflow.py", (), "workflow/result.json", pieces),
]


def timed(command: Command, arguments: Sequence[str]) -> dict[str, float]:
    """Runs it; wall and CPU seconds. Raises SystemExit with its status where it fails."""
    line = [sys.executable, str(HERE / command.script), *command.arguments, *arguments]
    print(f"$ python examples/experiments/{command.script} {shlex.join(line[2:])}", flush=True)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    status = subprocess.run(line).returncode
    if status:
        raise SystemExit(status)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - began, "cpu_seconds": cpu}


def table(output: Path) -> str:
    """Markdown of every command that has a result; its times where they were taken from outside."""
    taken = read(output / "times.json")
    lines = [
        "| command `python examples/experiments/` | result | a peer on the same data | wall, CPU |",
        "|---|---|---|---|",
    ]
    for command in COMMANDS:
        if (output / command.result).is_file():
            took = taken.get(command.name)
            times = f"{took['seconds']:.0f} s, {took['cpu_seconds']:.0f} s" if took else "not taken"
            call = shlex.join([command.script, *command.arguments])
            lines.append(f"| `{call}` | {command.figure(read(output / command.result))} | {command.peer} | {times} |")
    return "\n".join(lines)


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def write(output: Path, readme: Path, plots: Path) -> None:
    """Puts the table between its two marks in the README, and the plots beside the scripts."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    if not rest:
        raise ValueError(f"--write: {readme} must hold the line {BEGIN}")
    plots.mkdir(exist_ok=True)
    names = list(dict.fromkeys(command.result.split("/")[0] for command in COMMANDS))
    for name in (drawn := [name for name in names if (output / name / "result.png").is_file()]):
        shutil.copyfile(output / name / "result.png", plots / f"{name}.png")
    where = plots.relative_to(readme.parent).as_posix()
    pictures = "\n".join(f"![{name}]({where}/{name}.png)" for name in drawn)
    block = f"{BEGIN}\n{table(output)}\n\n{pictures}\n{END}"
    readme.write_text(before + block + rest.partition(END)[2], encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[c.name for c in COMMANDS], help="some commands")
    parser.add_argument("--missing", action="store_true", help="those without a result in the folder")
    parser.add_argument("--write", action="store_true", help="the table into examples/README.md, the plots beside it")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("others", nargs="*", help="after --: options for every command, as --threads 1")
    args = parser.parse_args(arguments)
    for command in COMMANDS:
        there = (args.output / command.result).is_file()
        if (args.only and command.name not in args.only) or (args.missing and there):
            continue
        took = timed(command, [*args.others, "--output", str(args.output)])
        times = read(args.output / "times.json") | {command.name: took}
        (args.output / "times.json").write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")
        print(f"{command.name}: {took['seconds']:.1f} s, {took['cpu_seconds']:.1f} s of the CPU\n", flush=True)
    print(table(args.output))
    if args.write:
        write(args.output, HERE.parent / "README.md", HERE / "plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
