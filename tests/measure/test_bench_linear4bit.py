"""The benchmark of 4-bit weights on tiny shapes: its rows, its checks, and what it says where bitsandbytes is absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"

import bench_linear4bit
from common import report, timing
from peers import fourbit as peers4bit


def test_tiny_run(tmp_path):
    """Every kind of case is timed, written and printed, from the command line."""
    command = [sys.executable, str(BENCH / "bench_linear4bit.py"), "--tiny", "--seconds", "0.05"]
    environment = os.environ | {"FASTPEFT_BENCH_RESULTS": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "linear4bit_cpu_tiny.json").read_text())
    assert [case["kind"] for case in data["cases"]] == [
        "dequantise",
        "quantise",
        "forward",
        peers4bit.LOOP,
        "step",
        peers4bit.KEPT,
    ]
    for case in data["cases"]:
        assert case["base"] in case["peers"] and "ours" in case["peers"]
        assert all(row["median_s"] > 0 and row["roof_share"] > 0 for row in case["peers"].values())
        assert f"{case['case']}: {case['what']}" in done.stdout
        assert case["packed_bytes"] == 64 * 64 // 2 + 64 + 4 * (1 + 256 + 1)
    steps = data["cases"][4]["peers"]
    assert steps["ours"]["kept_bytes"] <= steps["ours over bf16"]["kept_bytes"] + 64


def test_without_bitsandbytes(monkeypatch):
    """Its rows say why they are missing; ours are measured all the same."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for case in bench_linear4bit.cases("cpu", tiny=True):
        field = peers4bit.build(case)
        assert "ImportError" in field.absent["bitsandbytes"] or "ModuleNotFoundError" in field.absent["bitsandbytes"]
        assert "ours" in field.peers and not any(name.startswith("bitsandbytes") for name in field.peers)
        race = timing.Race({name: peer.call for name, peer in field.peers.items()}).run(0.01)
        row = bench_linear4bit.case_result(case, race, field, ROOF)
        text = report.result_tables({"environment": ENVIRONMENT, "notes": [], "cases": [row]})
        assert "bitsandbytes           absent: " in text and "not compared" in text


ROOF = {"copy_bytes_per_s": 1e10, "gemm_bf16_flop_per_s": 1e11}
ENVIRONMENT = {"cpu": "a CPU", "threads": 1, "torch": torch.__version__, "date": "2026-01-01T00:00:00"}


def test_other_bytes_are_refused():
    with pytest.raises(AssertionError, match="packed must equal bitsandbytes' to the bit"):
        peers4bit.require_equal("packed", torch.zeros(4), torch.tensor([0.0, 0.0, -0.0, 0.0]))


def test_peak_of_the_allocator():
    """Two tensors of which one is freed before the third: the two largest at once."""

    def call():
        first = torch.empty(1000)
        second = torch.empty(2000)
        del first
        return torch.empty(500), second

    assert timing.peak_cpu_bytes(call) == 4 * 3000


def test_paths_are_compared(tmp_path):
    """Every path that serves is timed for both passes, and the chosen one beside them."""
    pytest.importorskip("fastpeft._C", reason="the extension is not built")
    command = [sys.executable, str(BENCH), "paths", "--size", "128", "--rows", "1,20", "--seconds", "0.02"]
    environment = os.environ | {"FASTPEFT_BENCH_RESULTS": str(tmp_path)}
    done = subprocess.run([*command, "--isa", "base"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "linear4bit_paths_base_bf16.json").read_text())["rows"]
    assert [(row["pass"], row["M"], set(row["ms"])) for row in rows] == [
        ("forward", 1, {"gemv", "panels"}),
        ("forward", 20, {"gemv", "panels"}),
        ("backward", 1, {"panels"}),
        ("backward", 20, {"panels"}),
    ]
    assert all(row["chosen_ms"] > 0 and f"{row['over_fastest']:.2f}" in done.stdout for row in rows)
