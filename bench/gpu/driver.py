"""`make gpu`: everything a GPU has to prove, in one command under ten minutes, from a bare checkout.

    python bench gpu [--fresh] [--only STAGE] [--device cpu --dry-run]

Stages: build -> correctness -> tune -> bench -> fourbit -> summary. Each runs in a process of its own with a time
limit, so that one crash or hang costs one stage. A stage that passed for these sources and this GPU is not run again
unless --fresh, which forgets the timings of earlier runs too.
Nothing has to be installed beside torch and triton: the extension is built in place where this interpreter lacks it
(gpu/build.py). Without its CUDA kernels the run fails: nothing would have proven them.
Results: bench/results/gpu_state.json, tune_state.json, lora_linear_cuda.json, linear4bit_cuda.json, and ptx_twins.json,
the golden vectors of the emulator. Exit status 1 if a stage failed.
--dry-run exercises every stage at tiny shapes on the CPU, Triton under its interpreter, and tunes copies of the tables.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import tree
from gpu import build
from gpu.aims import AIMS, LORA_16

# Seconds at most. Correctness on a cold cache: gpu/budget.py expects 90, on 4 cores 270, where a second run takes
# up what the first has compiled.
STAGES = {"correctness": 180, "tune": 115, "bench": 170, "fourbit": 60}
GRACE = 30  # for the compile in flight when a stage's own budget ran out
TOTAL = 570  # of the build, about 45 on 16 cores, and all stages; the last gets what the others left, and GRACE
LINES = 20
FOURBIT_SHOWN = ("dequantize 14336", "forward 16x4096", "lora 2048x4096->14336")  # the other rows are in the JSON


class State:
    """What passed, for which sources and device; one JSON, rewritten atomically after every stage."""

    def __init__(self, device: str, dry_run: bool, forgotten: list[str]):
        self.path = tree.RESULTS / ("gpu_state_dry.json" if dry_run else "gpu_state.json")
        self.stamp = tree.stamp(device)
        self.data = {"stamp": self.stamp, "environment": {}, "stages": {}}
        if self.path.exists():
            loaded = json.loads(self.path.read_text())
            if loaded.get("stamp") == self.stamp:
                self.data = loaded
        for name in forgotten:
            self.data["stages"].pop(name, None)

    def passed(self, stage: str) -> bool:
        return self.data["stages"].get(stage, {}).get("ok", False)

    def save(self) -> None:
        tree.write_atomic(self.path, json.dumps(self.data, indent=1) + "\n")


def stage_correctness(device: str, dry_run: bool, budget_s: float, fresh: bool) -> dict:
    from checks.lora import Ctx, run_checks

    checks = {}
    for name, passed, detail in run_checks(Ctx(device, dry_run), budget_s):
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {detail}", flush=True)
        checks[name] = {"ok": passed, "detail": detail}
    return {"ok": all(check["ok"] for check in checks.values()), "checks": checks}


def stage_tune(device: str, dry_run: bool, budget_s: float, fresh: bool) -> dict:
    import shutil

    from tune.command import run_all
    from tune.tiles import Tuner

    def work(root: Path) -> dict:
        tuner = Tuner(
            device, budget_s, root, tiny=dry_run, log=lambda line: print(line, flush=True), fresh=dry_run or fresh
        )
        return run_all(tuner, (16,) if dry_run else (16, 64))

    if dry_run:
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


def stage_bench(device: str, dry_run: bool, budget_s: float, fresh: bool) -> dict:
    from peers import rows

    seconds = 0.5 if dry_run else min(8.0, budget_s / 16)  # a case has compiles and about 14 peers beside its rounds
    data = rows.run(device, dry_run, seconds, budget_s, progress=lambda line: print(line, flush=True))
    ratios = {
        case["case"]: {name: round(row["ratio"], 3) for name, row in case["peers"].items()} for case in data["cases"]
    }
    absent = {name: why for case in data["cases"] for name, why in case["absent"].items()}
    host = {name: row["median_s"] for name, row in data["host"]["peers"].items()}
    kept = {name: row["per_element_of_x"] for name, row in data["kept"].items() if isinstance(row, dict)}
    left_out = data["left_out"]
    return {"ok": not left_out, "errors": left_out, "ratios": ratios, "absent": absent, "host": host, "kept": kept}


def stage_fourbit(device: str, dry_run: bool, budget_s: float, fresh: bool) -> dict:
    from gpu import fourbit as gpu_fourbit

    data = gpu_fourbit.run(device, dry_run, budget_s, lambda line: print(line, flush=True), fresh)
    fourbit = {
        name: {peer: row["median_s"] * 1e6 for peer, row in case["peers"].items()}
        for name, case in data["cases"].items()
    }
    absent = {name: why for case in data["cases"].values() for name, why in case["absent"].items()}
    return {"ok": not data["left_out"], "errors": data["left_out"], "fourbit": fourbit, "absent": absent}


def run_stage(name: str, device: str, dry_run: bool, budget_s: float, fresh: bool = False) -> dict:
    """The stage's result, its output tail and time; a crash, a hang or a missing result is a failed stage."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(tree.ROOT / "bench"), "gpu", "--stage", name, "--out", str(out)]
        command += ["--device", device, "--budget", str(budget_s), *["--dry-run"] * dry_run, *["--fresh"] * fresh]
        env = dict(os.environ)
        if device == "cpu" and name not in ("bench", "fourbit"):  # benchmarks time what a CPU really runs
            env["TRITON_INTERPRET"] = "1"  # read when triton is imported
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   start_new_session=True)  # fmt: skip
        killed = False
        try:
            text, _ = process.communicate(timeout=budget_s + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its workers
            text, _ = process.communicate()
            killed = True
        print(text, end="", flush=True)
        result = json.loads(out.read_text()) if out.exists() else {"ok": False}
        if killed or process.returncode:
            tail = [line for line in text.strip().splitlines() if line.strip()][-1:] or ["no output"]
            result |= {"ok": False, "error": "out of time" if killed else f"exit {process.returncode}: {tail[0][:200]}"}
    return result | {"seconds": round(time.monotonic() - started, 1)}


def fourbit_aims(cases: dict[str, dict[str, float]]) -> list[str]:
    """A line of QLoRA over LoRA on a 16-bit weight, forward and backward, beside what is aimed at."""
    ratios = []
    for case, peers in cases.items():
        ours = [us for name, us in peers.items() if name.startswith("ours")]
        if case.startswith("lora") and ours and LORA_16 in peers:
            aim = 1.05 if case.startswith("lora 8192x") else 1.10
            ratios.append(f"{case.removeprefix('lora ')} {min(ours) / peers[LORA_16]:.2f} (aim {aim:.2f})")
    return [f"QLoRA / 16-bit LoRA: {', '.join(ratios)}"] if ratios else []


def aim(env: dict, case: str) -> str:
    """The aim beside a figure of this case, where it was measured on the GPU that the aim is for."""
    return f" (aim {AIMS[case]})" if case in AIMS and "H100" in env.get("gpu", "") else ""


def _stage_lines(name: str, row: dict) -> list[str]:
    """One line of a stage, and one for each of what failed."""
    said = [row["error"]] if "error" in row else []
    if name == "correctness":
        passed = [check["ok"] for check in row.get("checks", {}).values()]
        said.append(f"{sum(passed)} of {len(passed)} checks")
    if "jobs" in row:
        choices = list(row["strategies"].values())
        said.append(f"tiles: {row['jobs']}; fused in {choices.count('fused')} of {len(choices)} sizes")
        said.append(f"{len(row['fourbit_rows'])} limits of 4 bits")
    lines = [f"{'PASS' if row['ok'] else 'FAIL'} {name} ({row['seconds']} s) {'; '.join(said)}".rstrip()]
    lines += [f"     {k}: {check['detail']}"[:160] for k, check in row.get("checks", {}).items() if not check["ok"]]
    return lines + [f"     {error}"[:160] for error in row.get("errors", ())[:3]]


def summary(data: dict) -> list[str]:
    """At most LINES lines: what passed, what failed and why, the ratios."""
    env, stages = data["environment"], data["stages"]
    lines = [f"{env.get('gpu') or env['cpu']}, torch {env['torch']}, triton {env['triton']}, peft {env['peft']}, "
             f"commit {env['commit']}, {env['date']}"]  # fmt: skip
    if env.get("lacking"):
        lines.append(f"FAIL extension: NO CUDA KERNEL WAS TESTED OR TIMED, they require {env['lacking']}"[:200])
    for name, row in stages.items():
        lines += _stage_lines(name, row)
    bench, fourbit = stages.get("bench", {}), stages.get("fourbit", {})
    for case, ratios in bench.get("ratios", {}).items():
        cells = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if name.endswith("p=0.1"))
        lines.append(f"{case}, / frozen: {cells}{aim(env, case)}")
    if "kept" in bench:
        lines.append("kept for backward, q/k/v, bytes per element of x: "
                     + ", ".join(f"{n} {v:.2f}" for n, v in bench["kept"].items()))  # fmt: skip
        wanted = ("nn.Linear", "PEFT p=0", "ours LoRALinear")
        lines.append("host us, fwd · fwd+bwd: " + ", ".join(
            f"{n} {bench['host'][f'{n} fwd'] * 1e6:.0f} · {bench['host'][f'{n} fwd+bwd'] * 1e6:.0f}"
            for n in wanted if f"{n} fwd" in bench["host"]))  # fmt: skip
    for case, peers in fourbit.get("fourbit", {}).items():
        if case.startswith(FOURBIT_SHOWN):
            cells = ", ".join(f"{name} {us:.0f}" for name, us in peers.items())
            lines.append(f"4-bit {case}, us: {cells}{aim(env, case)}")
    lines += fourbit_aims(fourbit.get("fourbit", {}))
    absent = {**fourbit.get("absent", {}), **bench.get("absent", {})}
    reasons = sorted({f"{name.split(' p=')[0]}: {why}"[:100] for name, why in absent.items()})
    lines += [f"absent {'; '.join(reasons)}"] if reasons else []
    return lines[:LINES]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; the only way to run on the CPU")
    parser.add_argument("--fresh", action="store_true", help="run stages again that have passed")
    parser.add_argument("--only", choices=tuple(STAGES), help="run one stage")
    parser.add_argument("--stage", choices=tuple(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.dry_run:
        parser.error("gpu: --device must be cuda outside a dry run, got cpu")

    mode = tree.ensure_importable()
    import torch

    if args.stage:
        if args.device == "cpu":
            torch.set_num_threads(1)
        result = globals()[f"stage_{args.stage}"](args.device, args.dry_run, args.budget, args.fresh)
        tree.write_atomic(args.out, json.dumps(result))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu: device must be a CUDA GPU, got none; --device cpu --dry-run tries the driver itself", file=sys.stderr
        )
        return 1

    deadline = time.monotonic() + TOTAL
    where = importlib.util.find_spec("fastpeft").origin
    print(f"== {sys.executable}, torch {torch.__version__}, {where}", flush=True)
    lacking = build.build(torch.cuda.get_device_capability()) if args.device == "cuda" else None
    names = [args.only] if args.only else list(STAGES)
    state = State(args.device, args.dry_run, names if args.fresh else [])
    state.data["environment"] = tree.environment(args.device) | {"package": mode, "lacking": lacking}
    for name in names:
        if state.passed(name):
            print(f"== {name}: passed before for these sources on this device (--fresh runs it again)", flush=True)
            continue
        budget = round(min(60 if args.dry_run else STAGES[name], max(1, deadline - time.monotonic())))
        print(f"== {name}: at most {budget} s", flush=True)
        state.data["stages"][name] = run_stage(name, args.device, args.dry_run, budget, args.fresh)
        state.save()
    print("== summary")
    print("\n".join(summary(state.data)))
    return 0 if lacking is None and all(row["ok"] for row in state.data["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
