"""`make gpu`: everything a GPU has to prove, in one command under ten minutes, from a bare checkout.

    FASTPEFT_BENCH_RESULTS=dir python bench gpu [--fresh] [--only STAGE] [--experiments] [--device cpu --dry-run]

Stages, each a process of its own with a time limit, in the order of what a run that is cut off should have
(gpu/stages.py): compile beside the build, parts, headline, correctness, sanitizer, fourbit, tune, peers; then the
summary. All ends by 540 s. A stage that passed for these sources and this GPU is not run again unless --fresh.
Nothing has to be installed beside torch and triton: the extension is built in place where this interpreter lacks it
(gpu/build.py). Without its CUDA kernels the run fails: nothing would have proven them.
On disk as it happens, in one folder: gpu.log, every line; gpu_rows.jsonl, every measured row; gpu_state.json;
tune_state.json and tuned_tables.json (`python bench tune --install` puts these into kernels/); lora_linear_cuda.json,
linear4bit_cuda.json; ptx_twins.json, the golden vectors of the emulator. Exit status 1 if a stage failed.
--dry-run exercises every stage at tiny shapes on the CPU, Triton under its interpreter, and tunes copies of the tables.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import tree
from gpu import build
from gpu.stage import Stage, die_with_parent, read_rows, rows_path
from gpu.stages import INTERPRETED, OPTIONAL, RUN, SECONDS, TOTAL
from gpu.summary import summary

GRACE = 6  # seconds for the call in flight when a stage's own time ran out


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


class Log:
    """Prints lines, and appends them to a file that a killed run leaves whole; seconds since the start before each."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.started, self._file = time.monotonic(), path.open("a", buffering=1)
        self._lock = threading.Lock()  # the build speaks from a thread of its own

    def __call__(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)
            for line in text.splitlines():
                self._file.write(f"{time.monotonic() - self.started:6.1f} {line}\n")


def key_of(device: str) -> str:
    """What rows of an earlier run must share with this one to be shown with it."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return f"{tree.source_hash()} {name}"


def run_stage(name: str, device: str, dry_run: bool, until: float, key: str, fresh: bool = False, say=print) -> dict:
    """The stage's result and time, its lines said as they come; a crash, a hang, no result: a failed stage."""
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(tree.ROOT / "bench"), "gpu", "--stage", name, "--out", str(out), "--key", key]
        command += ["--device", device, "--until", str(until), "--parent", str(os.getpid())]
        command += ["--dry-run"] * dry_run + ["--fresh"] * fresh
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        if device == "cpu":
            env["TRITON_INTERPRET"] = str(int(name in INTERPRETED))  # read when triton is imported
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   start_new_session=True)  # fmt: skip
        killed = threading.Event()

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)  # with its workers
                killed.set()

        timer = threading.Timer(max(0.0, until + GRACE - time.time()), kill)
        timer.start()
        last = "no output"
        for line in process.stdout:  # ends when the process and its workers have closed it
            say(line.rstrip("\n"))
            last = line.strip() or last
        process.wait()
        timer.cancel()
        result = json.loads(out.read_text()) if out.exists() else {"ok": False}
        if killed.is_set() or process.returncode:
            said = "out of time" if killed.is_set() else f"exit {process.returncode}: {last[:200]}"
            result |= {"ok": False, "error": said}
    return result | {"seconds": round(time.time() - started, 1)}


def stage_main(args: argparse.Namespace) -> int:
    """Within a stage's process."""
    die_with_parent(args.parent)
    import torch

    if args.device == "cpu":
        torch.set_num_threads(1)
    stage = Stage(args.device, args.dry_run, args.until, args.fresh, args.key, lambda line: print(line, flush=True))
    result = RUN[args.stage](stage)
    tree.write_atomic(args.out, json.dumps(result))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; the only way to run on the CPU")
    parser.add_argument("--fresh", action="store_true", help="run stages again that have passed")
    parser.add_argument("--only", choices=tuple(SECONDS), help="run one stage")
    parser.add_argument("--experiments", action="store_true", help="also the kernels that no operator uses")
    parser.add_argument("--stage", choices=tuple(SECONDS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--key", default="", help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.dry_run:
        parser.error("gpu: --device must be cuda outside a dry run, got cpu")
    if args.stage:
        return stage_main(args)

    mode = tree.ensure_importable()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu: device must be a CUDA GPU, got none; --device cpu --dry-run tries the driver", file=sys.stderr)
        return 1
    return drive(args, mode)


def drive(args: argparse.Namespace, mode: str) -> int:
    import torch

    end = time.time() + TOTAL
    say = Log(tree.RESULTS / ("gpu_dry.log" if args.dry_run else "gpu.log"))
    where, key = importlib.util.find_spec("fastpeft").origin, key_of(args.device)
    say(f"== {sys.executable}, torch {torch.__version__}, {where}")
    names = [args.only] if args.only else [n for n in SECONDS if n not in OPTIONAL or args.experiments]

    def run(name: str) -> dict:
        seconds = 60 if args.dry_run else SECONDS[name] if name != names[-1] or args.only else TOTAL
        until = min(time.time() + seconds, end - GRACE)
        say(f"== {name}: at most {max(0, until - time.time()):.0f} s")
        return run_stage(name, args.device, args.dry_run, until, key, args.fresh, say)

    lacking, first = None, None
    if args.device == "cuda":
        built: list[str | None] = []
        capability = torch.cuda.get_device_capability()
        building = threading.Thread(target=lambda: built.append(build.build(capability, say=say)))
        building.start()  # nvcc beside Triton's compiles
        if names[0] == "compile":
            first = run("compile")
        building.join()
        lacking = built[0] if built else "a build that does not crash"
    state = State(args.device, args.dry_run, names if args.fresh else [])
    state.data["environment"] = tree.environment(args.device) | {"package": mode, "lacking": lacking}
    for name in names:
        if name == "compile" and first is not None:
            state.data["stages"][name] = first
        elif state.passed(name):
            say(f"== {name}: passed before for these sources on this device (--fresh runs it again)")
        else:
            state.data["stages"][name] = run(name)
        state.save()
    say("== summary")
    say("\n".join(summary(state.data, read_rows(rows_path(args.dry_run), key))))
    return 0 if lacking is None and all(row["ok"] for row in state.data["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
