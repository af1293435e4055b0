"""What `make gpu` builds, keeps and leaves out, and that its checks fit their stage: all that needs no GPU."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="the driver's stages run Triton kernels")

from checks import compiled, fourbit
from checks import lora as checks
from common import tree
from compile import pool
from gpu import build, sanitizer
from gpu import driver as gpu
from gpu import fourbit as gpu_fourbit
from gpu.stage import Stage
from gpu.stages import OPTIONAL, RUN, SECONDS, TOTAL
from peers import rows
from tune import tiles as tune

ENVIRONMENT = {"gpu": "any", "torch": "2", "triton": "3", "peft": None, "commit": "c", "date": "d"}


def _without_interpreter(code: str) -> str:
    """What the code prints in a process of its own: under the interpreter, which the tests run, kernels have no signature."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", env=os.environ | {"TRITON_INTERPRET": "0"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compiling_fits_its_stages():
    """Every kernel once, at 1.2 s, within the compile stage on 16 cores; without that stage the checks fit theirs.

    1.2 s is the mean of `make kernels` on a quiet core, and a fifth; its table has the seconds of its last, maybe busy, run.
    """
    code = (
        "import json; from gpu import budget, replay; from fastpeft.kernels._gpu import Gpu; "
        "each = {cc: len(replay.specialisations(Gpu(cc))) for cc in (80, 90)}; "
        "print(json.dumps([budget.expected(), each]))"
    )
    expected, each = json.loads(_without_interpreter(code))
    seconds = [1.2 * kernels or other for kernels, other in expected.values()]
    assert next(iter(expected)) == "4-bit linear cuda"
    assert pool.STARTUP + pool.makespan([1.2] * each["90"], 15) < 0.6 * SECONDS["compile"]
    assert 0 < each["80"] < each["90"] < sum(kernels for kernels, _ in expected.values())
    assert pool.makespan(seconds, checks.WORKERS, pool.STARTUP) < 1.3 * SECONDS["correctness"]
    assert max(seconds) < 90
    assert expected["4-bit linear cuda"][0] and expected["4-bit bytes"][0]
    assert pool.makespan([1, 2, 3], 2, 8) == 20 and pool.makespan([1, 2, 3], 2) == 4


def test_a_captured_launch_is_compiled_by_the_jit():
    """The warm-up on meta tensors: the driver says which GPU, and the JIT's own path compiles for it."""
    code = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=0: 0
driver.set_active(Driver())
from compile.pool import captured
from compile.cases import meta
from fastpeft.kernels import dequantize_4bit, lora_expand
with captured() as found:
    for _ in range(2):
        lora_expand.lora_expand(meta((64, 16), torch.bfloat16), meta((64, 16), torch.float32), None, None, 1.0)
(one,) = found.values()
one.compile()
cached = one.kernel.device_caches[0][0]
print(len(cached), next(iter(cached.values())).metadata.target.arch)
"""
    assert _without_interpreter(code).strip() == "1 90"


def test_a_pool_says_what_failed():
    """Each task in a process; one that is not done by the deadline is told too."""
    with pool.Pool(1) as running:
        tasks = {"fine": (os.getpid, ()), "bad": (int, ("a tile\nmore",))}
        found = {name: error for name, _, error in running.run(tasks, time.monotonic() + 60)}
        found |= {name: error for name, _, error in running.run({"late": (time.sleep, (60,))}, time.monotonic() + 0.2)}
    assert found.pop("bad").startswith("ValueError: invalid literal")
    assert found == {"fine": None, "late": "out of time, or its process crashed"}


def test_stages_fit_ten_minutes():
    """With the end of the last a while before the machine may be taken away."""
    assert sum(seconds for name, seconds in SECONDS.items() if name not in OPTIONAL) <= TOTAL <= 540
    assert list(SECONDS) == list(RUN)


def test_products_meet_every_format_and_row_count():
    """For Triton every kernel with every tile of rows; for CUDA every format in both 16-bit dtypes."""
    half = torch.bfloat16
    for shapes in (fourbit.FEW, fourbit.SOME, fourbit.MANY):
        triton = fourbit.linear_cases("triton", shapes, half)
        assert {(c.quant_type, c.block_size, c.double) for c in triton} == set(fourbit.FORMATS)
        assert {c.M for c in triton} == {shape[0] for shape in shapes}
        assert {c.dtype for c in triton} == {half, torch.float32} and {c.p for c in triton} == {0.0, 0.1}
    cuda = fourbit.linear_cases("cuda", fourbit.FEW + fourbit.MANY, half)
    small = {(c.quant_type, c.dtype) for c in cuda if c.M <= 64}
    assert {(name, dtype) for name in ("nf4", "fp4") for dtype in (half, torch.float16)} <= small


def test_without_peft(monkeypatch):
    """Its check is left out, and the other measurements of kept bytes stay."""
    monkeypatch.setitem(sys.modules, "peft", None)
    assert checks.check_peft(checks.Ctx("cpu", True)).startswith("left out: ")
    kept = rows.kept_result("cpu", True)
    assert kept["ours"]["bytes"] > 0
    assert kept["PEFT"].startswith("absent: ") and kept["PEFT base dtype"].startswith("absent: ")


def test_fresh_reaches_a_stage(monkeypatch):
    commands = []

    class Process:
        pid, returncode, stdout = 0, 0, ()

        def __init__(self, command, **_):
            commands.append(command)

        def wait(self):
            pass

    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    for fresh in (False, True):
        gpu.run_stage("tune", "cpu", True, time.time() + 60, "key", fresh)
    assert ["--fresh" in command for command in commands] == [False, True]


def test_fresh_forgets_the_stages_that_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "RESULTS", tmp_path)
    state = gpu.State("cpu", True, [])
    state.data["stages"] = {name: {"ok": True} for name in SECONDS}
    state.save()
    again = gpu.State("cpu", True, ["parts"])
    assert [name for name in SECONDS if not again.passed(name)] == ["parts"]


def test_tuning_errors_are_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "RESULTS", tmp_path)
    first = tune.Tuner("cpu", 1.0, tmp_path, tiny=True)
    first.state["errors"].append("a GPU that someone else held")
    first.state["jobs"]["any"] = {"done": True}
    first.save()
    second = tune.Tuner("cpu", 1.0, tmp_path, tiny=True)
    assert second.state["errors"] == [] and second.state["jobs"] == {"any": {"done": True}}
    assert tune.Tuner("cpu", 1.0, tmp_path, tiny=True, fresh=True).state["jobs"] == {}


def test_a_tile_that_failed_once_is_tried_again(tmp_path, monkeypatch):
    """The table's own: without its time nothing can be compared, so that the job says so and is not done."""
    monkeypatch.setattr(tree, "RESULTS", tmp_path)
    tuner = tune.Tuner("cpu", 60.0, tmp_path, tiny=True, log=lambda _: None)
    calls = []

    def prepare(module):
        def call(tile):
            calls.append(tile)
            if len(calls) == 1:
                raise RuntimeError("out of memory")
            return torch.zeros(1)

        return call

    def tune_it():
        tuner.tune_tiles("lora_shrink", "plain", 16, torch.float16, 10.0, prepare)
        (job,) = tuner.state["jobs"].values()
        return job["done"]

    assert not tune_it() and "the table's tile fails, RuntimeError: out of memory" in tuner.state["errors"][0]
    monkeypatch.setattr(tuner, "write_tile", lambda *_: None)
    assert tune_it() and len(tuner.state["errors"]) == 1


def test_fourbit_takes_up_cases_unless_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_fourbit, "copy_bandwidth", lambda *_: 1e12)
    monkeypatch.setattr(gpu_fourbit, "cases", lambda _: [])
    path = tmp_path / "linear4bit_cpu_tiny.json"
    for fresh, kept in ((False, {"any": {}}), (True, {})):
        path.write_text(json.dumps({"stamp": tree.stamp("cpu"), "cases": {"any": {}}}))
        assert gpu_fourbit.run(Stage("cpu", True, time.time() + 60, fresh))["ok"]
        assert json.loads(path.read_text())["cases"] == kept


def test_a_qlora_layer_comes_first():
    for tiny in (True, False):
        kinds = [case.kind for case in gpu_fourbit.cases(tiny)]
        assert kinds == sorted(kinds, key=["lora", "dequantize", "forward"].index)


@pytest.mark.parametrize("lacking", [None, "the compiled extension"])
def test_a_run_without_cuda_kernels_fails(tmp_path, monkeypatch, capsys, lacking):
    """Though every stage passes, and says so in its first lines. The kernels compile beside the build."""
    monkeypatch.setattr(tree, "RESULTS", tmp_path)
    monkeypatch.setattr(tree, "stamp", lambda _: {})
    monkeypatch.setattr(tree, "environment", lambda _: dict(ENVIRONMENT))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "any")
    running, together = threading.Event(), []

    def built(_, say):
        together.append(running.wait(10))
        return lacking

    def ran(name, *_):
        running.set()
        order.append(name)
        return {"ok": True, "seconds": 1.0}

    order: list[str] = []
    monkeypatch.setattr(build, "build", built)
    monkeypatch.setattr(gpu, "run_stage", ran)
    assert gpu.main([]) == (1 if lacking else 0)
    assert together == [True] and order == [name for name in SECONDS if name not in OPTIONAL]
    summary = capsys.readouterr().out.split("== summary\n")[1].splitlines()
    assert summary[1].startswith("FAIL extension: NO CUDA KERNEL" if lacking else "PASS compile")


def test_the_adjoint_tells_two_masks_apart():
    """What the compiled and the captured backward are held to."""
    assert "not with another call's mask" in compiled.check_adjoint(checks.Ctx("cpu", True))


def test_a_sanitizer_s_verdict(tmp_path, monkeypatch):
    """Every tool runs the CUDA kernels alone; one that finds something fails the stage, and its words are kept."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\ncase "$*" in *racecheck*) echo "RACECHECK SUMMARY: 1 hazard"; exit 9;; esac\n'
        'case "$*" in *4bit*sanitized*) echo "ERROR SUMMARY: 0 errors";; *) exit 3;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(tree, "RESULTS", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = []
    stage = Stage("cuda", True, time.time() + 60, key="k", say=said.append)
    result = sanitizer.run(stage)
    assert result == {"ok": False, "errors": ["racecheck: RACECHECK SUMMARY: 1 hazard"]}
    assert {name: row["ok"] for (_, name), row in stage.rows().items()} == {
        "memcheck": True, "racecheck": False, "synccheck": True
    }  # fmt: skip


def test_a_missing_extension_is_built(monkeypatch, capsys):
    """By this interpreter, for this GPU, once; where there is no nvcc it stays missing."""
    built = []

    class Process:
        pid, returncode = 0, 0

        def __init__(self, command, env, **_):
            built.append((command[:2], env["TORCH_CUDA_ARCH_LIST"]))

        def communicate(self, timeout=None):
            return "", None

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(build, "_stale", lambda _: False)
    monkeypatch.setattr(build, "lacking", lambda: None if built else "the compiled extension")
    monkeypatch.setattr(build.subprocess, "Popen", Process)
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    assert build.build((9, 0)) == "the compiled extension" and not built
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: "nvcc")
    assert build.build((9, 0)) is None and built == [([sys.executable, "setup.py"], "9.0a")]
    assert "== build: " in capsys.readouterr().out
    assert build.build((8, 0)) is None and len(built) == 1


def test_a_failed_build_is_lacking(monkeypatch, capsys):
    monkeypatch.setattr(build, "lacking", lambda: "the compiled extension")
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: "nvcc")
    monkeypatch.setattr(build, "COMMAND", [sys.executable, "-c", "print('a.cu: error: x'); raise SystemExit(3)"])
    assert build.build((9, 0)) == "a build that succeeds (a.cu: error: x)"
    monkeypatch.setattr(build, "COMMAND", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert "out of time" in build.build((9, 0), 0.5)


@pytest.mark.parametrize("cuda, wanted", [("python3", "python3"), ("own", "own"), ("neither", "own")])
def test_make_finds_the_interpreter(tmp_path, cuda, wanted):
    """That of `make env`, or the machine's own where only its torch has CUDA."""
    for name, path in (("own", tmp_path / "bin/python"), ("python3", tmp_path / "python3")):
        path.parent.mkdir(exist_ok=True)
        refuse = "" if name == cuda else 'case "$2" in *version.cuda*) exit 1;; esac'
        path.write_text(f'#!/bin/sh\n{refuse}\ncase "$1" in bench) echo ran {name} $2 $3;; esac\n')
        path.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name in ("PYTHON", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES"):  # `make PYTHON=... test` hands its own down
        env.pop(name, None)
    command = ["make", "-s", "-C", str(ROOT), "gpu", f"VENV={tmp_path}", "ARGS=--fresh"]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.stdout.strip() == f"ran {wanted} gpu --fresh", run.stderr
    given = subprocess.run([*command, f"PYTHON={tmp_path}/none"], env=env, capture_output=True, text=True)
    assert given.returncode and "PYTHON must be an interpreter with torch" in given.stderr
