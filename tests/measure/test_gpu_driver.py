"""`make gpu` needs a GPU; its dry run drives every stage at tiny shapes on the CPU. Also the writer of the tables."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="the driver's stages run Triton kernels under the interpreter")

from checks import twins
from common import tree
from common.timing import Race, quartiles
from fastpeft.kernels import _gpu_table
from fastpeft.kernels._gpu import Gpu
from gpu import aims
from gpu import driver as gpu
from tune import fourbit as tune_fourbit
from tune import tiles as tune


def _tables() -> dict[str, str]:
    """The generated section of every kernel file."""
    section = re.compile(r"# (?:tiles|tuned): begin.*?: end", re.DOTALL)
    texts = {path.name: section.search(path.read_text()) for path in (ROOT / "kernels").glob("*.py")}
    return {name: match[0] for name, match in texts.items() if match}


def _drive(results: Path, *args: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "FASTPEFT_BENCH_RESULTS": str(results), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(ROOT / "bench"), "gpu", "--device", "cpu", "--dry-run", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, cwd=results)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the PEFT stage needs peft and transformers")
def test_dry_run(tmp_path):
    """Every stage passes, the kernel tables stay as they were, and a second run does nothing again."""
    before = _tables()
    first = _drive(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    summary = first.stdout.split("== summary\n")[1].strip().splitlines()
    assert len(summary) <= gpu.LINES
    for stage in gpu.STAGES:
        assert any(line.startswith(f"PASS {stage}") for line in summary), summary
    assert before == _tables()
    state = json.loads((tmp_path / "gpu_state_dry.json").read_text())
    assert all(check["ok"] for check in state["stages"]["correctness"]["checks"].values())
    again = _drive(tmp_path)
    assert again.returncode == 0
    assert again.stdout.count("passed before") == len(gpu.STAGES)


def test_a_stage_out_of_time_fails(tmp_path, monkeypatch):
    """It is killed, its reason reaches the summary, and it does not count as passed."""
    monkeypatch.setenv("FASTPEFT_BENCH_RESULTS", str(tmp_path))
    row = gpu.run_stage("tune", "cpu", True, 0.2 - gpu.GRACE)
    assert row["ok"] is False and row["error"] == "out of time"
    lines = gpu.summary({"environment": tree.environment(), "stages": {"tune": row}})
    assert lines[1].startswith("FAIL tune") and "out of time" in lines[1]


def test_a_summary_fits_its_lines():
    """On a GPU with every stage passed, and with failures, which come before the figures."""
    environment = {"gpu": "NVIDIA H100", "torch": "2", "triton": "3", "peft": "0", "commit": "c", "date": "d"}
    ratios = {case: {"PEFT p=0.1": 3.0, "ours p=0.1": 1.07} for case in aims.AIMS if case.startswith("bf16")}
    host = {f"{name} {way}": 1e-5 for name in ("nn.Linear", "PEFT p=0") for way in ("fwd", "fwd+bwd")}
    fourbit = {
        f"{case}x4096->14336": {"ours cuda": 10.0, aims.LORA_16: 9.0}
        for case in ("forward 16", "lora 2048", "lora 8192")
    }
    stages = {
        "correctness": {"ok": True, "seconds": 1.0, "checks": {"a": {"ok": True, "detail": "x"}}},
        "tune": {"ok": True, "seconds": 1.0, "jobs": "3 of 3 done", "strategies": {"k": "fused"}, "fourbit_rows": {}},
        "bench": {
            "ok": True,
            "seconds": 1.0,
            "ratios": ratios,
            "kept": {"ours": 2.1},
            "host": host,
            "absent": {"u": "why"},
        },
        "fourbit": {"ok": True, "seconds": 1.0, "fourbit": fourbit, "absent": {}},
    }
    lines = gpu.summary({"environment": environment, "stages": stages})
    text = "\n".join(lines)
    assert len(lines) <= 20 and "ours p=0.1 1.07 (aim 1.08)" in text and "ours cuda 10, 16-bit LoRA 9 (aim 15)" in text
    assert "1 of 1 checks" in text and "fused in 1 of 1 sizes" in text and lines[-1] == "absent u: why"
    stages["correctness"]["checks"] |= {f"bad {i}": {"ok": False, "detail": "why"} for i in range(30)}
    lines = gpu.summary({"environment": environment, "stages": stages})
    assert len(lines) == gpu.LINES and lines[2] == "     bad 0: why"


def test_needs_a_gpu():
    run = subprocess.run(
        [sys.executable, str(ROOT / "bench"), "gpu", "--device", "cpu"], capture_output=True, text=True
    )
    assert run.returncode == 2 and "device must be cuda outside a dry run" in run.stderr


def test_fourbit_limits_are_written(tmp_path):
    """The tables come back as they were given, the formulas around them stay; a limit ends at the first loss."""
    path = tmp_path / "_fourbit_cost.py"
    text = (ROOT / "kernels" / path.name).read_text()
    path.write_text(text)
    key = ("sm90", "bf16", 64, 128)
    tables = {"LARGEST_SMALL": {key: 32}, "LARGEST_MID": {}, "LEAST_AUGMENTED": {(*key, 16): 0}}
    tune.replace_section(path, "tuned", tune_fourbit.format_tables(tables))
    read = {}
    exec(path.read_text().split("# tuned: begin")[1].split("# tuned: end")[0], read)
    assert {name: read[name] for name in tables} == tables
    tune.replace_section(path, "tuned", tune_fourbit.format_tables({name: {} for name in tables}))
    assert path.read_text() == text
    assert tune_fourbit.limit((1, 4, 8), lambda row: row != 8) == 4
    assert tune_fourbit.limit((1, 4, 8), lambda row: row > 1) == 0


def test_fourbit_aims():
    cases = {
        "lora 2048x4096->14336": {"16-bit LoRA": 100.0, "ours cuda": 108.0, "ours triton": 120.0},
        "forward 1x1->1": {},
    }
    assert gpu.fourbit_aims(cases) == ["QLoRA / 16-bit LoRA: 2048x4096->14336 1.08 (aim 1.10)"]
    assert gpu.fourbit_aims({}) == []


def test_golden_vectors_are_kept(tmp_path, monkeypatch):
    """As a GPU gave them; twins that give others fail the check, which says where."""
    monkeypatch.setattr(tree, "RESULTS", tmp_path)
    environment = dict.fromkeys(("gpu", "cc", "cuda", "date"), "any")
    words = {"bf16": [1, 2, 3], "fp16": [4, 5, 6]}
    path = tmp_path / twins.golden.FILE.name
    for other in (None, words):
        assert "written" in twins.keep(words, environment, other)
        assert twins.golden.read(path)["words"] == words
    with pytest.raises(AssertionError, match="differ from this GPU in 1 words of fp16, first 2"):
        twins.keep(words, environment, words | {"fp16": [4, 5, 7]})
    assert twins.golden.read(path)["words"] == words


def test_tables_are_rewritten(tmp_path):
    """A tuned tile lands between the markers, the file still imports to the same table, other entries stay."""
    for name in sorted({op for op, *_ in (*tune.JOBS, *tune_fourbit.TILES)}):
        path = tmp_path / f"{name}.py"
        shutil.copy(ROOT / "kernels" / path.name, path)
        tiles = {}
        section = path.read_text().split("# tiles: begin")[1].split("# tiles: end")[0]
        exec(section, tiles)
        table = {**tiles["TILES"], (91, "half", "plain", 16): {"BLOCK_M": 32, "FLATTEN": True}}
        text = path.read_text()
        tune.replace_section(path, "tiles", tune.format_tiles(table))
        changed = path.read_text()
        assert changed.split("# tiles: end")[1] == text.split("# tiles: end")[1]
        assert changed.split("# tiles: begin")[0] == text.split("# tiles: begin")[0]
        read = {}
        exec(changed.split("# tiles: begin")[1].split("# tiles: end")[0], read)
        assert read["TILES"] == table
    with pytest.raises(ValueError, match="must hold one pair"):
        tune.replace_section(path, "no such marker", "")


def test_strategy_table_is_rewritten(tmp_path):
    path = tmp_path / "_strategy_table.py"
    shutil.copy(ROOT / "kernels" / path.name, path)
    table = {("sm90", "bf16", (13, 12, 12, 16, True)): "fused", ("sm90", "bf16", (11, 12, 12, 16, False)): "accumulate"}
    tune.write_strategies(path, table)
    read = {}
    exec(path.read_text(), read)
    assert read["TABLE"] == table
    tune.write_strategies(path, {})
    exec(path.read_text(), read)
    assert read["TABLE"] == {}


def test_own_entries_copy_every_rank():
    """Tuning one rank on a new arch must not hide the ranks that were served by the arch below."""
    tiles = {(80, "half", "plain", 16): {"BLOCK_M": 1}, (80, "half", "plain", 64): {"BLOCK_M": 2}}
    mine = tune.own_entries(tiles, 90, "half", "plain", lambda rank: tiles[80, "half", "plain", rank])
    assert mine == {(90, "half", "plain", 16): {"BLOCK_M": 1}, (90, "half", "plain", 64): {"BLOCK_M": 2}}


def test_race_takes_turns_and_pairs_rounds():
    order = []
    peers = {name: (lambda name=name: order.append(name)) for name in "abc"}
    race = Race(peers)
    rounds = race.warm_up(0.01, min_rounds=8, max_rounds=8)
    order.clear()
    for _ in range(rounds):
        race.round()
    turns = ["".join(order[3 * i : 3 * i + 3]) for i in range(rounds)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 1
    assert {row["rounds"] for row in race.summary("a").values()} == {rounds}
    assert race.summary("a")["a"]["ratio"] == 1.0
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_a_first_call_that_compiles_is_no_sample(monkeypatch):
    seconds = iter([2.0, 0.1, 0.1, *[0.1] * 9])
    race = Race({"peer": lambda: None})
    monkeypatch.setattr(race, "time_one", lambda name: next(seconds))
    assert race.run(0.5, min_rounds=3, max_rounds=9).samples["peer"] == [0.1] * 5


def test_a_device_s_copy_rate_is_written(tmp_path, monkeypatch):
    """Under its name, beside those of other devices; the model takes it from the next choice on."""
    path = tmp_path / "_gpu_table.py"
    shutil.copy(ROOT / "kernels" / path.name, path)
    monkeypatch.setattr(tree, "RESULTS", tmp_path)
    monkeypatch.setattr(tune, "copy_bandwidth", lambda *_: 4.1234e12)
    monkeypatch.setattr(_gpu_table, "COPY_RATE", {"another": 1e12})
    tuner = tune.Tuner("cpu", 1.0, tmp_path, tiny=True, log=lambda _: None)
    tuner.measure_copy()
    assert _gpu_table.COPY_RATE == {"another": 1e12}  # a device without a name
    tuner.arch = Gpu(90, "NVIDIA H200")
    tuner.measure_copy()
    read = {}
    exec(path.read_text(), read)
    assert read["COPY_RATE"] == _gpu_table.COPY_RATE == {"another": 1e12, "NVIDIA H200": 4.12e12}
