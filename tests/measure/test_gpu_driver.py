"""`make gpu` needs a GPU; its dry run drives every stage at tiny shapes on the CPU. Also the writer of the tables."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="the driver's stages run Triton kernels under the interpreter")

from checks import twins
from common import tree
from common.timing import Race, quartiles
from fastpeft.kernels import _cost, _gpu_table
from fastpeft.kernels._gpu import Gpu
from gpu import aims, headline
from gpu import driver as gpu
from gpu.stage import Stage, read_rows
from gpu.stages import OPTIONAL, SECONDS
from gpu.summary import LINES, fourbit_aims, summary
from peers import rows as rows_of_peers
from tune import fourbit as tune_fourbit
from tune import tables
from tune import tiles as tune


def _tables() -> dict[str, str]:
    """The generated section of every kernel file."""
    section = re.compile(r"# (?:tiles|tuned): begin.*?: end", re.DOTALL)
    texts = {path.name: section.search(path.read_text()) for path in (ROOT / "kernels").glob("*.py")}
    return {name: match[0] for name, match in texts.items() if match}


def _drive(results: Path, *args: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "FASTPEFT_BENCH_RESULTS": str(results), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(_command(*args), env=env, capture_output=True, text=True, timeout=240, cwd=results)


def _command(*args: str) -> list[str]:
    return [sys.executable, str(ROOT / "bench"), "gpu", "--device", "cpu", "--dry-run", *args]


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the PEFT stage needs peft and transformers")
def test_dry_run(tmp_path):
    """Every stage passes in its order, the kernel tables stay as they were, and a second run does nothing again."""
    before = _tables()
    first = _drive(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    summary = first.stdout.split("== summary\n")[1].strip().splitlines()
    assert len(summary) <= LINES
    stages = [stage for stage in SECONDS if stage not in OPTIONAL]
    assert [line.split()[1] for line in summary if line.startswith("PASS")] == stages
    assert before == _tables()
    state = json.loads((tmp_path / "gpu_state_dry.json").read_text())
    assert all(check["ok"] for check in state["stages"]["correctness"]["checks"].values())
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "gpu_rows_tiny.jsonl").read_text().splitlines()]
    assert [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind] == [
        "compile", "roof", "part", "headline", "check", "sanitizer", "fourbit", "tune", "kept", "host", "peers"
    ]  # fmt: skip
    assert all(row in (tmp_path / "gpu_dry.log").read_text() for row in ("step fused", "PASS headline"))
    assert json.loads((tmp_path / "tuned_tables_tiny.json").read_text())["_strategy_table"]["marker"] == "tuned"
    assert len(list(tmp_path.iterdir())) <= 8  # what a borrowed machine lets come back
    again = _drive(tmp_path)
    assert again.returncode == 0
    assert again.stdout.count("passed before") == len(stages)


def _rows(folder: Path) -> list[dict]:
    """Every whole row; at most the last line may be cut."""
    path = folder / "gpu_rows_tiny.jsonl"
    lines = path.read_text().split("\n") if path.exists() else []
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            assert i == len(lines) - 1, f"line {i} of {len(lines)} is broken"
    return rows


def _children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            stat = path.read_text().rsplit(")", 1)[1].split()
            if int(stat[1]) == pid and stat[0] != "Z":
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="a killed parent takes its children along on Linux alone")
@pytest.mark.parametrize(("stage", "wanted"), [("parts", 0), ("parts", 2), ("parts", 16), ("headline", 2)])
def test_a_killed_run_keeps_what_it_measured(tmp_path, stage, wanted):
    """SIGKILL at any point: the rows that were there are there, the log is, and no process goes on."""
    env = {**os.environ, "FASTPEFT_BENCH_RESULTS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(_command("--only", stage), env=env, stdout=subprocess.DEVNULL, cwd=tmp_path)
    log, limit = tmp_path / "gpu_dry.log", time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        if (
            log.exists()
            and f"== {stage}" in log.read_text()
            and len(_rows(tmp_path)) >= wanted
            and _children(process.pid)
        ):
            break
        time.sleep(0.02)
    assert process.poll() is None, f"{stage} had ended before it was killed"
    children, seen = _children(process.pid), _rows(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    limit = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < limit:
        time.sleep(0.05)
    assert children and not any(Path(f"/proc/{child}").exists() for child in children), "a stage outlived the driver"
    rows = _rows(tmp_path)
    assert len(rows) >= max(len(seen), wanted) and rows[: len(seen)] == seen
    text = log.read_text()
    assert f"== {stage}" in text
    assert ("measured" in text) == (stage == "parts" and wanted > 0)  # the head of the table, said before its rows
    key = rows[0]["key"] if rows else ""
    with (tmp_path / "gpu_rows_tiny.jsonl").open("a") as file:
        file.write('\n{"key": "cut sho')
    assert read_rows(tmp_path / "gpu_rows_tiny.jsonl", key).keys() == {(row["kind"], row["name"]) for row in rows}


def test_a_row_after_a_cut_one_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "RESULTS", tmp_path)
    stage = Stage("cpu", True, 0.0, key="k")
    stage.row("part", "a", us=1.0)
    with (tmp_path / "gpu_rows_tiny.jsonl").open("a") as file:
        file.write('\n{"key": "k", "kind": "pa')
    stage.row("part", "b", us=2.0)
    stage.row("part", "a", us=3.0)
    assert {name: row["us"] for (_, name), row in stage.rows().items()} == {"a": 3.0, "b": 2.0}
    assert Stage("cpu", True, 0.0, key="other sources").rows() == {}


def test_a_stage_out_of_time_fails(tmp_path, monkeypatch):
    """It is killed, its reason reaches the summary, and it does not count as passed."""
    monkeypatch.setenv("FASTPEFT_BENCH_RESULTS", str(tmp_path))
    row = gpu.run_stage("tune", "cpu", True, time.time() + 0.2 - gpu.GRACE, "key", say=lambda _: None)
    assert row["ok"] is False and row["error"] == "out of time"
    lines = summary({"environment": tree.environment(), "stages": {"tune": row}}, {})
    assert lines[1].startswith("FAIL tune") and "out of time" in lines[1]


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_a_summary_fits_its_lines(name):
    """On a GPU with every stage passed, and with failures, which come before the figures. A GPU without aims has the
    model and the floor beside its ratios."""
    environment = {"gpu": name, "torch": "2", "triton": "3", "peft": "0", "commit": "c", "date": "d"}
    rows, of_name = {}, {each.name: each for each in rows_of_peers.cases("cuda")}
    for case in (case for case in aims.AIMS["NVIDIA H100 80GB HBM3"] if case.startswith("bf16")):
        gpu = Gpu(90, name)
        beside = headline.verdict(of_name[case], gpu, 0.1, ("accumulate", "fused"), _cost.arch_of(gpu))
        peers = {"frozen": {"ratio": 1.0}, "PEFT p=0.1": {"ratio": 3.0}, "ours p=0.1": {"ratio": 1.07} | beside}
        rows["headline", f"{case} p=0.1 burst"] = {"case": case, "p": 0.1, "peers": peers, "absent": {"u p=0": "why"}}
    host = {f"{peer} {way}": 1e-5 for peer in ("nn.Linear", "PEFT p=0") for way in ("fwd", "fwd+bwd")}
    rows["host", "tiny call"] = {"seconds": host}
    rows["kept", "q/k/v"] = {"per_element_of_x": {"ours": 2.1}}
    for case in ("forward 16", "lora 2048", "lora 8192"):
        us = {"ours cuda": 10.0, aims.LORA_16: 9.0}
        rows["fourbit", f"{case}x4096->14336"] = {"us": us, "floor_us": 5.0}
    stages = {stage: {"ok": True, "seconds": 1.0} for stage in SECONDS}
    stages["correctness"]["checks"] = {"a": {"ok": True, "detail": "x"}}
    stages["tune"] |= {"jobs": "3 of 3 done", "strategies": {"k": "fused"}, "fourbit_rows": {}}
    lines = summary({"environment": environment, "stages": stages}, rows)
    text = "\n".join(lines)
    aimed = name != "NVIDIA H200"
    assert len(lines) <= LINES and "PEFT 3.00, ours 1.07 (model 1." in text and "floor 1." in text
    assert ("aim 1.08" in text) == aimed and ("ours cuda 10, 16-bit LoRA 9 (floor 5, aim 15)" in text) == aimed
    assert "1 of 1 checks" in text and "fused in 1 of 1 sizes" in text and lines[-1] == "absent u: why"
    stages["correctness"]["checks"] |= {f"bad {i}": {"ok": False, "detail": "why"} for i in range(50)}
    lines = summary({"environment": environment, "stages": stages}, rows)
    assert len(lines) == LINES and "     bad 0: why" in lines


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
    limits = {"LARGEST_SMALL": {key: 32}, "LARGEST_MID": {}, "LEAST_AUGMENTED": {(*key, 16): 0}}
    tables.replace_section(path, "tuned", tune_fourbit.format_tables(limits))
    read = {}
    exec(path.read_text().split("# tuned: begin")[1].split("# tuned: end")[0], read)
    assert {name: read[name] for name in limits} == limits
    tables.replace_section(path, "tuned", tune_fourbit.format_tables({name: {} for name in limits}))
    assert path.read_text() == text
    assert tune_fourbit.limit((1, 4, 8), lambda row: row != 8) == 4
    assert tune_fourbit.limit((1, 4, 8), lambda row: row > 1) == 0


def test_fourbit_aims():
    cases = {
        "lora 2048x4096->14336": {"16-bit LoRA": 100.0, "ours cuda": 108.0, "ours triton": 120.0},
        "forward 1x1->1": {},
    }
    assert fourbit_aims(cases) == ["QLoRA / 16-bit LoRA: 2048x4096->14336 1.08 (aim 1.10)"]
    assert fourbit_aims({}) == []


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
        tables.replace_section(path, "tiles", tables.format_tiles(table))
        changed = path.read_text()
        assert changed.split("# tiles: end")[1] == text.split("# tiles: end")[1]
        assert changed.split("# tiles: begin")[0] == text.split("# tiles: begin")[0]
        read = {}
        exec(changed.split("# tiles: begin")[1].split("# tiles: end")[0], read)
        assert read["TILES"] == table
    with pytest.raises(ValueError, match="must hold one pair"):
        tables.replace_section(path, "no such marker", "")


def test_strategy_table_is_rewritten_kept_and_installed(tmp_path):
    """In the folder of the kernels and in the results, from where it goes into another checkout."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        shutil.copy(ROOT / "kernels" / "_strategy_table.py", folder)
        shutil.copy(ROOT / "kernels" / "_gpu_table.py", folder)
    table = {("sm90", "bf16", (13, 12, 12, 16, True)): "fused", ("sm90", "bf16", (11, 12, 12, 16, False)): "accumulate"}
    kept = tmp_path / "tuned.json"
    written = tables.Tables(folders[0], kept)
    written.write("_strategy_table", "tuned", tables.format_strategies(table))
    written.write("_gpu_table", "tuned", 'COPY_RATE: dict[str, float] = {"any": 1e12}')
    assert tables.install(kept, folders[1]) == ["_strategy_table", "_gpu_table"]
    for folder in folders:
        read = {}
        exec((folder / "_strategy_table.py").read_text(), read)
        exec((folder / "_gpu_table.py").read_text(), read)
        assert read["TABLE"] == table and read["COPY_RATE"] == {"any": 1e12}
    written.write("_strategy_table", "tuned", tables.format_strategies({}))
    exec((folders[0] / "_strategy_table.py").read_text(), read)
    assert read["TABLE"] == {}
    kept.write_text(
        json.dumps({"_gpu_table": {"marker": "tuned", "body": "x"}, "_strategy_table": {"marker": "no", "body": ""}})
    )
    before = (folders[1] / "_gpu_table.py").read_text()
    with pytest.raises(ValueError, match="must hold one pair"):
        tables.install(kept, folders[1])
    assert (folders[1] / "_gpu_table.py").read_text() == before


def test_own_entries_copy_every_rank():
    """Tuning one rank on a new arch must not hide the ranks that were served by the arch below."""
    tiles = {(80, "half", "plain", 16): {"BLOCK_M": 1}, (80, "half", "plain", 64): {"BLOCK_M": 2}}
    mine = tables.own_entries(tiles, 90, "half", "plain", lambda rank: tiles[80, "half", "plain", rank])
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
