"""Writes the measured tables of docs/choosing.md from the files that `fastpeft compare` left in bench/results.

python -m fastpeft compare --retime --threads 1 --out bench/results/compare_sentiment   # on an idle machine
python bench/choosing.py                                                                # then this
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastpeft.cli.compare import record, report

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "choosing.md"
RESULTS = ROOT / "bench" / "results"
TASKS = ("sentiment", "digits")
COLUMNS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11)
HEADINGS = ("method", "metric, %", "seeds", "rate", "trained", "weights, MB", "gradients + optimizer, MB", "kept, MB",
            "peak, MB", "step, ms of processor", "/ first")  # fmt: skip


def block(task: str) -> str:
    """The table of a task and the notes below it, between their marks."""
    made = record.Record.found(RESULTS / f"compare_{task}" / "compare.json")
    rows = [["" if row[i] == "-" else row[i].split(" (")[0] for i in COLUMNS]
            for row in report.rows(made.data, made.points(), made.seeds())]  # fmt: skip
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|--:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    notes = [f"- {note}" for note in report.notes(made.data)]
    return "\n".join([f"<!-- compare {task} -->", "", *lines, "", *notes, "", f"<!-- end {task} -->"])


def filled(page: str) -> str:
    """The page with the blocks of all tasks renewed."""
    for task in TASKS:
        before, start, rest = page.partition(f"<!-- compare {task} -->")
        _, end, after = rest.partition(f"<!-- end {task} -->")
        if not start or not end:
            raise ValueError(f"choosing: {PAGE.name} must have the marks of {task}, got none")
        page = before + block(task) + after
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"Wrote {PAGE}.", file=sys.stderr)
