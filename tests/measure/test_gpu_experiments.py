"""The kernels that no operator uses: right where an interpreter runs them, and compiled for sm_90 where none does."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="the experiments are Triton kernels")

from common import tree
from experiments import command
from gpu.stage import Stage


def test_one_kernel_is_right(tmp_path, monkeypatch):
    """Forward and backward in one launch each, under the interpreter; a row for each, and Gluon left out with a reason."""
    monkeypatch.setattr(tree, "RESULTS", tmp_path)
    said = []
    stage = Stage("cpu", True, time.time() + 60, key="k", say=said.append)
    assert command.run(stage) == {"ok": True, "errors": []}
    rows = {name: row for (kind, name), row in stage.rows().items() if not name.endswith("error")}
    assert [name.split(" ", 1)[1] for name in rows] == ["one kernel, forward", "one kernel, backward"]
    assert all(row["error"] < 2e-3 and row["us"] > 0 for row in rows.values())
    assert said[0].startswith("experiments: Gluon's are left out")


def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "RESULTS", tmp_path)
    wrong = {"wrong": ("forward", lambda: command.torch.zeros(512, 256)), "broken": ("forward", lambda: 1 / 0)}
    monkeypatch.setattr(command, "experiments", lambda *_: wrong)
    result = command.run(Stage("cpu", True, time.time() + 60, key="k", say=lambda _: None))
    assert not result["ok"] and "differs by 1" in result["errors"][0] and "ZeroDivisionError" in result["errors"][1]


@pytest.mark.skipif(command.gluon_lacks() is not None, reason="the Gluon kernels are written for Triton 3.6")
def test_gluon_kernels_compile():
    """For sm_90, no GPU: no register spills."""
    code = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=0: 0
driver.set_active(Driver())
from compile.kernels import meta, resources
from experiments import gluon_gemm, gluon_helpers
half, (M, N, K, R) = torch.bfloat16, (8192, 4096, 4096, 16)
x, w, a, b, s, y = (meta(size, half) for size in ((M, K), (N, K), (R, K), (N, R), (M, R), (M, N)))
given = ((gluon_gemm, "_gemm_kernel", (x, w, s, b, y)),
         (gluon_helpers, "_gemm_helped_kernel", (x, w, a, b, y, s, meta((64,), torch.int32))))
for module, name, of in given:
    kernel = getattr(module, name)
    print(resources(kernel.warmup(*module.arguments(*of), 132, grid=(132,), **module.TILE, num_warps=8))[1])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "0"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0"]
