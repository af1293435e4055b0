"""Tables and plots from bench/results/*.json.

python bench report                 every table, in text
python bench report --readme        the README's table, in markdown
python bench report --plots         a PNG beside every JSON
"""

import argparse
import json
from itertools import compress
from pathlib import Path

from common import tree


def _machine(environment: dict) -> str:
    where = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} thread"
    return f"{where}, torch {environment['torch']}, peft {environment.get('peft')}, {environment['date'][:10]}"


_COUNTED = {"bytes": "of activations and adapters", "weight_bytes": "of weight", "scratch_bytes": "of partial sums"}


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _spread(row: dict) -> str:
    return f"{row['ratio']:.2f} [{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]"


def _agreement(found: dict) -> str:
    said = [f"{name} {value if isinstance(value, str) else format(value, '.1e')}" for name, value in found.items()]
    return "beside bitsandbytes: " + (", ".join(said) or "not compared")


def result_tables(data: dict) -> str:
    """Plain-text tables of one results file: cases, host time, kept bytes, launches, what was absent and why."""
    lines = [_machine(data["environment"]), *(f"note: {note}" for note in data.get("notes", ()))]
    for case in data["cases"]:
        lines.append(f"\n{case['case']}: {case.get('what', 'forward + backward')}")
        absent = case.get("absent", {})
        width = max(22, *map(len, (*case["peers"], *absent)))
        title = f"/ {case.get('base', 'frozen')} [quartiles]"
        lines.append(f"  {'peer':{width}} {'median':>11} {'IQR':>9} {title:>26} {'of roof':>8}  rounds")
        for name, row in case["peers"].items():
            iqr = (row["q3_s"] - row["q1_s"]) / row["median_s"]
            share = f"{row['roof_share']:.0%}" if "roof_share" in row else ""
            extra = f"  / frozen fp32 {row['ratio_fp32']:.2f}" if "ratio_fp32" in row else ""
            extra += f"  peak {row['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in row else ""
            extra += f"  kept {row['kept_bytes'] / 1e6:.2f} MB" if "kept_bytes" in row else ""
            extra += f"  extra {row['extra_bytes'] / 1e6:.1f} MB" if "extra_bytes" in row else ""
            extra += "".join(f"  {times:.2f} x as fast as {peer}" for peer, times in row.get("faster", {}).items())
            lines.append(f"  {name:{width}} {_time(row['median_s']):>11} {iqr:>8.1%} {_spread(row):>27} {share:>8}  "
                         f"{row['rounds']:>4}{extra}")  # fmt: skip
        lines += [f"  {name:{width}} absent: {why}" for name, why in absent.items()]
        if "agreement" in case:
            lines.append("  " + _agreement(case["agreement"]))
        elif isinstance(case.get("counted", {}), str):
            lines.append(f"  {case['counted']}")
        else:
            for strategy, c in case.get("counted", {}).items():
                moved = ", ".join(f"{c[key] / 1e6:.1f} MB {what}" for key, what in _COUNTED.items())
                flop = c["flop"] / 1e9
                lines.append(f"  counted, {strategy}, p=0.1: {c['launches']} launches, {flop:.2f} GFLOP, {moved}")
    if "host" in data:
        lines.append("\nhost time of one call, x [4, 8], W [8, 8]")
        lines += [f"  {name:28} {_time(row['median_s']):>11}" for name, row in data["host"]["peers"].items()]
        lines += [f"  {name:28} absent: {why}" for name, why in data["host"]["absent"].items()]
    if "kept" in data:
        lines.append(f"\nkept for backward, {data['kept']['case']}, bytes per token and channel of x (x itself is 2)")
        lines += [
            f"  {name:22} {row['per_element_of_x']:.2f}" for name, row in data["kept"].items() if isinstance(row, dict)
        ]
    return "\n".join(lines)


def _peer_table(data: dict) -> list[str]:
    """Markdown: one line a case and peer, where the cases do not have their peers and their base in common."""
    lines = [f"\n{_machine(data['environment'])}; median of interleaved rounds [quartiles]", ""]
    lines += ["| case | peer | time | ratio |", "|---|---|---|---|"]
    for case in data["cases"]:
        for name, row in case["peers"].items():
            ratio = "1" if name == case["base"] else f"{_spread(row)} of {case['base']}"
            times = "".join(f", {times:.1f} x as fast as {peer}" for peer, times in row.get("faster", {}).items())
            lines.append(f"| {case['case']} | {name} | {_time(row['median_s'])} | {ratio}{times} |")
    return [*lines, "", *(f"{note}." for note in data.get("notes", ()))]


def readme_table(results: list[dict]) -> str:
    """Markdown: one line a case and dropout, the ratio of every peer to the frozen linear of the same run."""
    names = ["eager", "PEFT", "PEFT base dtype", "torch.compile", "ours"]
    lines = []
    for data in results:
        if any("base" in case for case in data["cases"]):
            lines += _peer_table(data)
            continue
        lines += [
            f"\n{_machine(data['environment'])}; time ÷ frozen linear's forward + dX, median of interleaved rounds",
            "",
        ]
        lines += ["| case | p | frozen | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
        for case in data["cases"]:
            rows = case["peers"]
            for p in ("0", "0.1"):
                cells = [f"{rows[f'{n} p={p}']['ratio']:.2f}" if f"{n} p={p}" in rows else "–" for n in names]
                frozen = _time(rows["frozen"]["median_s"])
                lines.append(f"| {case['case']} | {p} | {frozen} | " + " | ".join(cells) + " |")
        lines += ["", *(f"{note}." for note in data.get("notes", ()))]
        if "host" in data:
            host = data["host"]["peers"]
            sides = (("nn.Linear", "nn.Linear"), ("PEFT p=0", "PEFT"), ("ours p=0", "`lora_linear`"),
                     ("ours LoRALinear", "`LoRALinear`"))  # fmt: skip
            lines += [
                "",
                "| host time of a tiny call | " + " | ".join(label for _, label in sides) + " |",
                "|---" * 5 + "|",
            ]
            for side in ("fwd", "fwd+bwd"):
                cells = [_time(host[f"{n} {side}"]["median_s"]) if f"{n} {side}" in host else "–" for n, _ in sides]
                lines.append(f"| {side} | " + " | ".join(cells) + " |")
        if "kept" in data:
            kept = {n: row["per_element_of_x"] for n, row in data["kept"].items() if isinstance(row, dict)}
            lines += ["", f"Kept for backward, {data['kept']['case']}, bytes per token and channel of x: "
                      + ", ".join(f"{name} {value:.2f}" for name, value in kept.items()) + "."]  # fmt: skip
    return "\n".join(lines).strip()


def plot(data: dict, path: Path) -> Path | None:
    """Bars of time ÷ the base's per case and peer, with quartiles. None where matplotlib is not installed (says so)."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    if not data["cases"]:
        return None
    count = len(data["cases"])
    columns = min(count, 4)
    size = (max(4.5, 3.4 * columns), 4.2 * -(-count // columns))
    figure, grid = pyplot.subplots(-(-count // columns), columns, figsize=size, squeeze=False, layout="constrained")
    axes = grid.ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis, case in zip(axes, data["cases"], strict=False):
        rows = {name: row for name, row in case["peers"].items() if name != "frozen fp32"}
        ratios = [row["ratio"] for row in rows.values()]
        low = [max(0.0, row["ratio"] - row["ratio_q1"]) for row in rows.values()]
        high = [max(0.0, row["ratio_q3"] - row["ratio"]) for row in rows.values()]
        colors = ["#3a6ea5" if name.startswith("ours") else "#b0b0b0" for name in rows]
        axis.barh(list(rows), ratios, xerr=[low, high], color=colors, ecolor="#505050", capsize=2)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(case["case"], fontsize=9, loc="right")
        axis.tick_params(labelsize=8)
        base = case.get("base", "frozen linear (forward + dX)")
        axis.set_xlabel(f"time ÷ {base}", fontsize=8)
    figure.suptitle(_machine(data["environment"]), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--plots", action="store_true")
    parser.add_argument("--op", default="lora_linear")
    args = parser.parse_args(argv)
    paths = [p for p in sorted(tree.RESULTS.glob(f"{args.op}_*.json")) if not p.stem.endswith("_tiny")]
    loaded = [json.loads(path.read_text()) for path in paths]
    # gpu/fourbit.py keeps its cases by name, to take up a run that was cut off, and `make gpu` prints them itself.
    listed = [isinstance(data["cases"], list) for data in loaded]
    paths, loaded = list(compress(paths, listed)), list(compress(loaded, listed))
    if not loaded:
        raise SystemExit(
            f"report: bench/results must hold a result of {args.op}, found none; run make bench OP={args.op}"
        )
    if args.plots:
        for path, data in zip(paths, loaded, strict=True):
            print(plot(data, path.with_suffix(".png")))
    print(readme_table(loaded) if args.readme else "\n\n".join(result_tables(data) for data in loaded))


if __name__ == "__main__":
    main()
