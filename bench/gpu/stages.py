"""The stages of `make gpu`, in the order of what a run that is cut off should have: each a function of a Stage.

compile      the kernels of the next steps, once each, in processes, beside the build by nvcc
parts        each kernel by itself beside the cost model and its floor, error against fp32
experiments  only with --experiments: kernels that no operator uses (bench/experiments/)
headline     a training step beside frozen, eager and PEFT, burst and sustained
correctness  every check on the device; what the first stage compiled is found
sanitizer    compute-sanitizer over the CUDA kernels, where the tool exists
fourbit      4-bit products, a QLoRA layer's step first
tune         tiles, strategies and limits, candidates compiled in processes
peers        host time, bytes kept, and last the peers that a compiler of their own makes
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import tree
from gpu.stage import Stage

# Seconds at most; the last takes what the others left. gpu/budget.py says what compiling is expected to take.
SECONDS = {
    "compile": 75, "parts": 50, "experiments": 60, "headline": 75, "correctness": 95, "sanitizer": 35, "fourbit": 55,
    "tune": 65, "peers": 90,
}  # fmt: skip
TOTAL = 540  # of a whole run, on a machine that may be taken away at 600
OPTIONAL = ("experiments",)
INTERPRETED = ("parts", "correctness", "tune", "experiments")  # in a dry run; benchmarks time what a CPU really runs


def compile_kernels(stage: Stage) -> dict:
    from compile.pool import Pool, compile_seconds, expected_seconds, makespan
    from gpu.replay import compile_one, here, specialisations

    found, each, workers = specialisations(here()), compile_seconds(), Pool.count()
    names, seconds = list(found), [expected_seconds(one.like, each) for one in found.values()]
    stage.say(f"compile: {len(names)} kernels, {sum(seconds):.0f} s of one core, expected "
              f"{makespan(seconds, workers):.0f} s on {workers} and {Pool.STARTUP:.0f} to start")  # fmt: skip
    if stage.device != "cuda":
        stage.row("compile", "all", kernels=len(names), compiled=0, detail="left out: the interpreter compiles nothing")
        return {"ok": True}
    started, done, errors = time.monotonic(), 0, []
    deadline = started + stage.left() - 1
    with Pool(workers) as pool:
        for name, taken, error in pool.run({name: (compile_one, (name,)) for name in names}, deadline):
            done += error is None
            if error is not None:
                errors.append(f"{name[:60]}: {error}")
                stage.say(f"FAIL compile {name[:100]}: {error}")
            elif taken > 10:
                stage.say(f"compile: {name[:80]} took {taken:.0f} s")
    stage.row("compile", "all", kernels=len(names), compiled=done, seconds=time.monotonic() - started)
    stage.say(f"compile: {done} of {len(names)} in {time.monotonic() - started:.0f} s")
    return {"ok": not errors, "errors": errors}


def parts(stage: Stage) -> dict:
    from gpu import parts

    return parts.run(stage)


def experiments(stage: Stage) -> dict:
    from experiments import command

    return command.run(stage)


def headline(stage: Stage) -> dict:
    from gpu import headline

    return headline.run(stage)


def correctness(stage: Stage) -> dict:
    from checks.lora import Ctx, run_checks

    checks = {}
    for name, passed, detail in run_checks(Ctx(stage.device, stage.tiny), stage.left()):
        stage.say(f"{'ok  ' if passed else 'FAIL'} {name}: {detail}")
        stage.row("check", name, ok=passed, detail=detail)
        checks[name] = {"ok": passed, "detail": detail}
    return {"ok": all(check["ok"] for check in checks.values()), "checks": checks}


def sanitizer(stage: Stage) -> dict:
    from gpu import sanitizer

    return sanitizer.run(stage)


def fourbit(stage: Stage) -> dict:
    from gpu import fourbit

    return fourbit.run(stage)


def tune(stage: Stage) -> dict:
    from tune.command import run_all
    from tune.tiles import Tuner

    def work(root: Path) -> dict:
        forget = stage.tiny or stage.fresh
        tuner = Tuner(stage.device, stage.left(), root, tiny=stage.tiny, log=stage.say, fresh=forget)
        state = run_all(tuner, (16,) if stage.tiny else (16, 64))
        for name, job in state["jobs"].items():
            stage.row("tune", name, winner=job.get("winner"), timed=len(job["seconds"]), failed=len(job["failed"]))
        return state

    if stage.tiny:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "kernels"
            shutil.copytree(tree.ROOT / "kernels", root, ignore=shutil.ignore_patterns("__pycache__"))
            state = work(root)
            for path in root.glob("*.py"):
                compile(path.read_text(), str(path), "exec")
    else:
        state = work(tree.ROOT / "kernels")
    won = sum("winner" in job for job in state["jobs"].values())
    done = sum(job["done"] for job in state["jobs"].values())
    return {
        "ok": not state["errors"],
        "errors": state["errors"],
        "jobs": f"{done} of {len(state['jobs'])} done, {won} tiles new",
        "strategies": {key: row["choice"] for key, row in state["strategies"].items()},
        "fourbit_rows": state["fourbit"],
    }


def peers(stage: Stage) -> dict:
    from gpu import others

    return others.run(stage)


RUN: dict[str, Callable[[Stage], dict]] = {
    "compile": compile_kernels, "parts": parts, "experiments": experiments, "headline": headline,
    "correctness": correctness, "sanitizer": sanitizer, "fourbit": fourbit, "tune": tune, "peers": peers,
}  # fmt: skip
