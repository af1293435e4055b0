"""What a comparison leaves behind: the printed table, summary.json, comparison.png."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from _measure import smoothed

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt

COLOURS = {"plain PEFT": "#b0413e", "accelerated": "#1d6996"}


def show(summary: dict[str, Any], out: Console) -> None:
    """Prints the table and, below it, each claim with the number that carries it."""
    runs = summary["runs"]
    names = list(runs)
    table = Table(title=f"{summary['task']}, {summary['settings']['precision']}, {summary['machine']['device']}")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for label, cell in _rows(summary):
        table.add_row(label, *(cell(runs[name]) for name in names))
    out.print(table)
    for line in _claims(summary):
        out.print("- " + line, markup=False, soft_wrap=True)


def _rows(summary: dict[str, Any]):
    before = summary["before"]
    yield "test loss before -> after", lambda run: f"{before['loss']:.3f} -> {run['loss']:.3f}"
    if before["accuracy"] is None:
        yield "perplexity before -> after", lambda run: f"{math.exp(before['loss']):.1f} -> {math.exp(run['loss']):.1f}"
    else:
        yield "test accuracy before -> after", lambda run: f"{before['accuracy']:.1%} -> {run['accuracy']:.1%}"
    window = summary["loss_curves"]["window"]
    yield f"training loss, last {window} steps", lambda run: f"{smoothed(run['train_losses'], window)[-1]:.3f}"
    yield "step time, median", lambda run: f"{run['step_seconds_median'] * 1e3:.1f} ms"
    yield "training time", lambda run: f"{run['train_seconds']:.1f} s"
    yield "throughput", lambda run: f"{run['tokens_per_second']:,.0f} tokens/s, {run['rows_per_second']:.1f} rows/s"
    shape = "x".join(map(str, summary["settings"]["batch"]))
    yield f"kept for backward, batch {shape}", lambda run: f"{run['kept_for_backward_bytes'] / 1e6:.1f} MB"
    if all(run["peak_step_bytes"] is not None for run in summary["runs"].values()):
        yield "peak of that step, allocator", lambda run: f"{run['peak_step_bytes'] / 1e6:.1f} MB"


def _claims(summary: dict[str, Any]):
    ratio, curves, adapter = summary["time_ratio"], summary["loss_curves"], summary["adapter"]
    plain, ours = summary["runs"].values()
    yield (
        f"Step time, accelerated / plain, paired by batch: {ratio['median']:.3f} "
        f"(quartiles {ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f}; "
        f"first {ratio['steps_left_out']} steps left out)."
    )
    share = ours["kept_for_backward_bytes"] / plain["kept_for_backward_bytes"]
    yield f"Bytes kept for backward, accelerated / plain: {share:.3f}."
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
    """Loss curves, step times and bytes kept, side by side."""
    runs, window = summary["runs"], summary["loss_curves"]["window"]
    figure, (losses, times, kept) = plt.subplots(1, 3, figsize=(14, 4), width_ratios=(3, 3, 1.4), layout="constrained")
    for name, run in runs.items():
        colour = COLOURS[name]
        losses.plot(run["train_losses"], color=colour, alpha=0.2, linewidth=0.8)
        mean = smoothed(run["train_losses"], window)
        losses.plot(
            range(window - 1, window - 1 + len(mean)), mean, color=colour, label=f"{name}, mean of {window} steps"
        )
        times.plot([1e3 * value for value in run["step_seconds"]], ".", color=colour, markersize=3, label=name)
    losses.set(xlabel="step", ylabel="training loss [nats]", title="Loss: same batches, same start")
    times.set(xlabel="step", ylabel="step time [ms]", ylim=(0, None))
    times.set_title(f"Step time: accelerated / plain = {summary['time_ratio']['median']:.3f}")
    losses.legend()
    times.legend()
    names = list(runs)
    heights = [runs[name]["kept_for_backward_bytes"] / 1e6 for name in names]
    kept.bar_label(kept.bar(names, heights, color=[COLOURS[name] for name in names]), fmt="%.1f")
    kept.set(ylabel="MB", title="Kept for backward", ylim=(0, 1.1 * max(heights)))
    figure.suptitle(f"{summary['task']}, {summary['settings']['precision']}, {summary['machine']['device']}")
    figure.savefig(file, dpi=120)
    plt.close(figure)
