"""docs/choosing.md: its tables are those of bench/results, its example runs."""

import json

import pytest

for needed in ("rich", "matplotlib"):
    pytest.importorskip(needed, reason=f"the command needs {needed}: pip install fastpeft[compare]")

import choosing
from fastpeft.cli.compare import main


def test_the_page_has_the_measured_tables():
    """docs/choosing.md shows what bench/results holds, and its own task runs as it stands there."""
    page = choosing.PAGE.read_text(encoding="utf-8")
    assert choosing.filled(page) == page, "run python bench/choosing.py"


def test_the_page_s_own_task_runs(tmp_path):
    code = choosing.PAGE.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    (tmp_path / "mine.py").write_text(code)
    options = ["--methods", "lora,adapter,head,full", "--epochs", "5", "--seeds", "1", "--no-plots", "--rounds", "1"]
    assert main(["--task", f"{tmp_path / 'mine.py'}:make", "--out", str(tmp_path / "out"), *options]) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]
    assert all(run["metric"] > 0.4 for run in found.values())
