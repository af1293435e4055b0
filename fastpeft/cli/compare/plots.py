"""The figures of a comparison: metric over trained parameters, memory, step time, loss."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpeft.cli.compare.record import run_key
from fastpeft.cli.compare.report import Line, lines

PARTS = {"weights": ("weights", "#7f8c8d"), "trained": ("gradients, optimizer", "#b0413e"),
         "kept": ("kept for backward", "#1d6996")}  # fmt: skip


def plot(data: Mapping[str, Any], points: Mapping[str, Any], seeds: list[int], file: Path) -> None:
    """Write ``file``, with any suffix that matplotlib knows."""
    import matplotlib

    matplotlib.use("Agg")  # writes files without a display
    import matplotlib.pyplot as plt

    shown = [line for line in lines(data, points, seeds) if line.metrics]
    colours = {line.key: plt.get_cmap("tab20")(i % 20) for i, line in enumerate(shown)}
    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    _metric(axes[0, 0], data, shown, colours)
    _curves(axes[0, 1], data, shown, seeds, colours)
    _memory(axes[1, 0], shown)
    _time(axes[1, 1], data, shown, colours)
    figure.suptitle(f"{data['settings']['task_name']}, {data['settings']['steps']} steps, {len(seeds)} seed(s)")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _metric(axis: Any, data: Mapping[str, Any], shown: list[Line], colours: Mapping[str, Any]) -> None:
    scale = 100 if data["settings"]["metric"] == "accuracy" else 1
    trained = [line for line in shown if line.run["trainable"]]
    dots = []
    for line in trained:
        values = [scale * value for value in line.metrics]
        error = statistics.stdev(values) if len(values) > 1 else 0
        x, y = line.run["trainable"], statistics.fmean(values)
        axis.errorbar(x, y, yerr=error, fmt="o", color=colours[line.key], capsize=3)
        dots.append((y, x, line.key))
    if dots:
        axis.set_xscale("log")
    # Names in a column beside the points, ordered by height, because the points of similar methods overlap.
    for i, (y, x, key) in enumerate(sorted(dots)):
        place = (1.03, (i + 0.5) / len(dots))
        thread = {"arrowstyle": "-", "linewidth": 0.4, "color": colours[key]}
        word = {"textcoords": "axes fraction", "fontsize": 8, "va": "center", "color": colours[key]}
        axis.annotate(key, (x, y), xytext=place, arrowprops=thread, **word)
    unit = " [%]" if scale == 100 else ""
    axis.set(xlabel="trained parameters", ylabel=f"{data['settings']['metric']}{unit}",
             title="Metric: mean, standard deviation over the seeds")  # fmt: skip


def _curves(
    axis: Any, data: Mapping[str, Any], shown: list[Line], seeds: list[int], colours: Mapping[str, Any]
) -> None:
    for line in shown:
        runs = [data["runs"].get(run_key(line.key, seed), {}).get("curve") for seed in seeds]
        curves = [curve for curve in runs if curve]
        if curves:
            steps = [step for step, _ in curves[0]]
            means = [statistics.fmean(loss) for loss in zip(*([loss for _, loss in c] for c in curves), strict=True)]
            axis.plot(steps, means, color=colours[line.key], label=line.key, linewidth=1.4)
    axis.set(xlabel="step", ylabel="training loss [nats]", title="Loss: mean over the seeds, same batches")
    if shown:
        axis.legend(fontsize=7, ncols=2)


def _memory(axis: Any, shown: list[Line]) -> None:
    measured = [line for line in shown if line.memory]
    left = [0.0] * len(measured)
    names = [line.key for line in measured]
    for part, (title, colour) in PARTS.items():
        sizes = [line.memory[part] / 1e6 for line in measured if line.memory]
        axis.barh(names, sizes, left=left, color=colour, label=title)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    peaks = [line.memory["peak"] / 1e6 for line in measured if line.memory]
    axis.plot(peaks, names, "k|", markersize=12, label="peak of a step")
    axis.invert_yaxis()
    axis.set(xlabel="MB", title="Memory of a training step")
    axis.legend(fontsize=8)


def _time(axis: Any, data: Mapping[str, Any], shown: list[Line], colours: Mapping[str, Any]) -> None:
    clock = data["costs"].get("clock", "wall")
    for line in shown:
        if line.time:
            low, middle, high = (1e3 * value for value in line.time[clock])
            axis.barh(line.key, middle, color=colours[line.key], xerr=[[middle - low], [high - middle]], capsize=3)
    axis.invert_yaxis()
    busy = ", on a busy machine" if data["costs"].get("busy") else ""
    named = "processor time" if clock == "cpu" else "time"
    axis.set(xlabel="ms", title=f"Step, {named}: median, quartiles{busy}")
