"""The table of a comparison: in Markdown, and printed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from fastpeft.cli.compare.record import run_key

SHOWN = (0, 1, 4, 5, 6, 7, 8, 9, 11)  # printed columns: all of them would not fit a terminal


@dataclass(frozen=True)
class Line:
    """One point in numbers; None for what is unknown."""

    key: str
    metrics: list[float]
    errors: list[str]
    run: Mapping[str, Any]
    memory: Mapping[str, Any] | None
    time: Mapping[str, Any] | None


def lines(data: Mapping[str, Any], points: Mapping[str, Any], seeds: list[int]) -> list[Line]:
    made, costs = [], data["costs"]
    for key in points:
        runs = [data["runs"].get(run_key(key, seed), {}) for seed in seeds]
        done = [run for run in runs if "metric" in run]
        errors = list(dict.fromkeys(run["error"] for run in runs if "error" in run))
        memory, time = (costs.get(part, {}).get(key) for part in ("memory", "time"))
        metrics = [run["metric"] for run in done]
        made.append(Line(key, metrics, errors, done[0] if done else {}, memory, time))
    return made


def spread(values: list[float], percent: bool) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return "-"
    scale, digits = (100, 1) if percent else (1, 2)
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def headings(data: Mapping[str, Any]) -> list[str]:
    settings = data["settings"]
    arrow = "higher is better" if settings["higher"] else "lower is better"
    unit = ", %" if settings["metric"] == "accuracy" else ""
    return [
        "method", f"{settings['metric']}{unit} ({arrow})", "seeds", "learning rate", "trained", "weights, MB",
        "gradients and optimizer, MB", "kept for backward, MB", "peak of a step, MB", "step, ms (quartiles)",
        "its processor time, ms", "step / first", "in the end",
    ]  # fmt: skip


def cells(line: Line, data: Mapping[str, Any]) -> list[str]:
    """The row of a point that has at least one run."""
    parts = ("weights", "trained", "kept", "peak")
    mega = [_megabytes(line.memory[part]) if line.memory else "-" for part in parts]
    wall = cpu = ratio = "-"
    if line.time:
        wall, cpu = _milliseconds(line.time["wall"]), _milliseconds(line.time["cpu"])
        ratio = f"{line.time['ratio'][1]:.2f}"
    metric = spread(line.metrics, data["settings"]["metric"] == "accuracy")
    rate = f"{line.run['learning_rate']:g}" if line.run["trainable"] else "-"
    trained = f"{line.run['trainable']:,}"
    ended = "; ".join([each for each in (line.run["about"],) if each] + line.errors)
    return [line.key, metric, str(len(line.metrics)), rate, trained, *mega, wall, cpu, ratio, ended]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}" if size >= 10e6 else f"{size / 1e6:.2f}"


def _milliseconds(seconds: list[float]) -> str:
    low, middle, high = (1e3 * each for each in seconds)
    digits = 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def rows(data: Mapping[str, Any], points: Mapping[str, Any], seeds: list[int]) -> list[list[str]]:
    """Cells of every point, with its error if it has no run."""
    made = []
    for line in lines(data, points, seeds):
        if line.metrics:
            made.append(cells(line, data))
        else:
            said = line.errors[0] if line.errors else "not run yet"
            made.append([line.key, "-", "0", *["-"] * (len(headings(data)) - 4), said])
    return made


def notes(data: Mapping[str, Any]) -> list[str]:
    """What a reader must know about the numbers."""
    settings, costs = data["settings"], data["costs"]
    machine = data["machines"][-1] if data["machines"] else {}
    precision = f"{settings['dtype']}{', products under bfloat16 autocast' if settings['autocast'] else ''}"
    said = [
        f"Task: {settings['task_name']}; {settings['steps']} steps of {settings['batch_rows']} rows out of "
        f"{settings['train_rows']}, the same batches in the same order for every method, each seed with an order of "
        f"its own; AdamW, rates falling linearly to zero; {precision}.",
        f"Metric: mean over the seeds ± sample standard deviation, on {settings['test_rows']} rows kept for the test."
        + (f" Always the most frequent class: {settings['floor']:.1%}." if settings.get("floor") else ""),
        f"Every method trains the head ({', '.join(settings['head'])}) too, at rate {settings['head_rate']:g}; "
        "the method head trains nothing else, at the rate in its row."
        if settings["head"]
        else "There is no head to train.",
    ]
    if costs:
        said += [
            f"Memory: bytes of tensors in one step on a batch {_shape(costs['memory_batch'])}; the peak holds weights "
            "and the optimizer's states too.",
            f"Step time: median and quartiles of {costs['rounds']} steps on a batch {_shape(costs['time_batch'])}, all "
            f"methods taking turns in one process, {costs['threads']} thread(s); step / first: median of the ratio of "
            f"{'processor times' if costs['clock'] == 'cpu' else 'times'} within a round.",
        ]
        if costs["busy"]:
            loads = max(each for each in costs["load_average"] if each is not None)
            said.append(
                f"**The machine was busy while steps were timed** (load {loads:.1f}): times are too high, ratios "
                "rough. `--retime` on an idle machine takes them anew."
            )
    if machine:
        said.append(f"Machine: {machine['device']}, {machine['cpu_threads']} thread(s); torch {machine['torch']}.")
    return said


def _shape(shape: list[int]) -> str:
    return " × ".join(map(str, shape))


def markdown(data: Mapping[str, Any], points: Mapping[str, Any], seeds: list[int]) -> str:
    """Table and notes."""
    head = headings(data)
    table = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 2) + "|---|"]
    for row in rows(data, points, seeds):
        table.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
    title = f"# {data['settings']['task_name']}: methods side by side\n"
    return "\n".join([title, *table, "", *(f"- {note}" for note in notes(data)), ""])


def show(data: Mapping[str, Any], points: Mapping[str, Any], seeds: list[int], out: Console) -> None:
    """Print the table, and below it the notes."""
    table = Table(title=f"{data['settings']['task_name']}: methods side by side")
    names = (
        "method",
        data["settings"]["metric"],
        "trained",
        "weights",
        "states",
        "kept",
        "peak MB",
        "step ms",
        "/ first",
    )
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold", no_wrap=i > 0)
    ended = []
    for row in rows(data, points, seeds):
        table.add_row(*(row[i].split(" (")[0] for i in SHOWN))
        ended += [f"{row[0]}: {row[-1]}"] if row[-1] else []
    out.print(table)
    for line in ended:
        out.print(line, markup=False, soft_wrap=True)
    for note in notes(data):
        out.print("- " + note.replace("**", ""), markup=False, soft_wrap=True)
