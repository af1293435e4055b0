"""What a comparison leaves behind: the printed table, summary.json, comparison.png."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from _measure import smoothed

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt

COLOURS = ("#b0413e", "#1d6996")
# What the plot's bars show, where the runs have it: key of a run, title.
BARS = {"kept_for_backward_bytes": "Kept for backward", "frozen_bytes": "Frozen linear weights"}


def show(summary: dict[str, Any], out: Console, claims: Iterable[str] | None = None) -> None:
    """Prints the table and, below it, each claim with the number that carries it: `claims`, or those of an adapter that
    runs plain and accelerated.
    """
    runs = summary["runs"]
    names = list(runs)
    table = Table(title=f"{summary['task']}, {summary['settings']['precision']}, {summary['machine']['device']}")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for label, cell in _rows(summary):
        table.add_row(label, *(cell(runs[name]) for name in names))
    out.print(table)
    for line in claims or _claims(summary):
        out.print("- " + line, markup=False, soft_wrap=True)


def _rows(summary: dict[str, Any]):
    def change(key: str, format: Callable[[float], str]):
        return lambda run: f"{format(run['before'][key])} -> {format(run[key])}"

    yield "test loss before -> after", change("loss", "{:.3f}".format)
    if summary["before"]["accuracy"] is None:
        yield "perplexity before -> after", change("loss", lambda loss: f"{math.exp(loss):.1f}")
    else:
        yield "test accuracy before -> after", change("accuracy", "{:.1%}".format)
    window = summary["loss_curves"]["window"]
    yield f"training loss, last {window} steps", lambda run: f"{smoothed(run['train_losses'], window)[-1]:.3f}"
    yield "step time, median", lambda run: f"{run['step_seconds_median'] * 1e3:.1f} ms"
    yield "training time", lambda run: f"{run['train_seconds']:.1f} s"
    yield "throughput", lambda run: f"{run['tokens_per_second']:,.0f} tokens/s, {run['rows_per_second']:.1f} rows/s"
    shape = "x".join(map(str, summary["settings"]["batch"]))
    yield f"kept for backward, batch {shape}", lambda run: f"{run['kept_for_backward_bytes'] / 1e6:.1f} MB"
    for key, label in (
        ("peak_step_bytes", "peak of that step, allocator"),
        ("frozen_bytes", "frozen weights of the adapted layers"),
        ("resident_bytes", "peak of a process that trains it alone"),
    ):
        if all(run.get(key) is not None for run in summary["runs"].values()):
            yield label, lambda run, key=key: f"{run[key] / 1e6:.1f} MB"


def claims_of_cost(summary: dict[str, Any]):
    """Time of a step and bytes kept, of the second run beside the first."""
    ratio = summary["time_ratio"]
    (first, plain), (second, ours) = summary["runs"].items()
    yield (
        f"Step time, {second} / {first}, paired by batch: {ratio['median']:.3f} "
        f"(quartiles {ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f}; "
        f"first {ratio['steps_left_out']} steps left out)."
    )
    share = ours["kept_for_backward_bytes"] / plain["kept_for_backward_bytes"]
    yield f"Bytes kept for backward, {second} / {first}: {share:.3f}."


def _claims(summary: dict[str, Any]):
    curves, adapter = summary["loss_curves"], summary["adapter"]
    yield from claims_of_cost(summary)
    if summary["settings"]["dropout"]:
        yield (
            f"Loss curves (different dropout masks): running means over {curves['window']} steps differ by at most "
            f"{curves['largest_smoothed_difference']:.4f}; mean difference {curves['mean_difference']:+.4f} "
            f"+- {2 * curves['standard_error']:.4f} (two standard errors)."
        )
    else:
        gap = curves["largest_step_difference"]
        yield f"Loss curves (no LoRA dropout): a single step differs by at most {gap:.1e}."
    if "decided_differently" in summary:
        yield f"The two trained models decide differently on {summary['decided_differently']:.1%} of the test rows."
    if "baseline" in summary:
        yield f"Honest baseline, {summary['baseline']['what']}: accuracy {summary['baseline']['accuracy']:.1%}."
    same = "are" if adapter["reloaded_equals_restored_bitwise"] else "are NOT"
    yield (
        f"Adapter saved to {adapter['folder']} and loaded in plain PEFT: its logits {same} bit for bit those of the "
        f"trained model after fastpeft.restore ({adapter['rows_compared']} rows)."
    )
    if adapter["accelerated_equals_reloaded_bitwise"]:
        logits = "equal bit for bit"
    else:
        gap, largest = adapter["largest_logit_difference"], adapter["largest_logit"]
        logits = f"differ by at most {gap:.1e} (largest logit {largest:.1f})"
    yield (
        f"Accelerated against that reloaded adapter, dropout off: logits {logits}; gradients differ by at most "
        f"{adapter['largest_relative_gradient_difference']:.1e} (relative norm, worst weight)."
    )


def save(summary: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Writes summary.json and comparison.png; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / "summary.json", folder / "comparison.png"
    numbers.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    plot(summary, picture)
    return numbers, picture


def plot(summary: dict[str, Any], file: Path) -> None:
    """Loss curves, step times and bytes, side by side."""
    runs, window = summary["runs"], summary["loss_curves"]["window"]
    colours = dict(zip(runs, COLOURS, strict=True))
    bars = {key: title for key, title in BARS.items() if all(key in run for run in runs.values())}
    widths = (3, 3, *(1.4 for _ in bars))
    figure, axes = plt.subplots(
        1, len(widths), figsize=(11 + 3 * len(bars), 4), width_ratios=widths, layout="constrained"
    )
    losses, times, *rest = axes
    for name, run in runs.items():
        colour = colours[name]
        losses.plot(run["train_losses"], color=colour, alpha=0.2, linewidth=0.8)
        mean = smoothed(run["train_losses"], window)
        losses.plot(
            range(window - 1, window - 1 + len(mean)), mean, color=colour, label=f"{name}, mean of {window} steps"
        )
        times.plot([1e3 * value for value in run["step_seconds"]], ".", color=colour, markersize=3, label=name)
    losses.set(xlabel="step", ylabel="training loss [nats]", title="Loss: same batches, same start")
    times.set(xlabel="step", ylabel="step time [ms]", ylim=(0, None))
    first, second = runs
    times.set_title(f"Step time: {second} / {first} = {summary['time_ratio']['median']:.3f}", fontsize=10)
    losses.legend()
    times.legend()
    for axis, (key, title) in zip(rest, bars.items(), strict=True):
        heights = [run[key] / 1e6 for run in runs.values()]
        axis.bar_label(axis.bar(list(runs), heights, color=list(colours.values())), fmt="%.1f")
        axis.set(ylabel="MB", title=title, ylim=(0, 1.1 * max(heights)))
    figure.suptitle(f"{summary['task']}, {summary['settings']['precision']}, {summary['machine']['device']}")
    figure.savefig(file, dpi=120)
    plt.close(figure)
