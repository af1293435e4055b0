"""The headline: a training step of a LoRA linear over the frozen layer's, beside eager torch and PEFT, by strategy.

Burst: one call at a time on a cold L2, as after an idle moment. Sustained: half a second of each without a pause, at
the clocks and the heat of a training run. The order is drawn anew each round; ratios are taken round by round.
"""

from collections.abc import Callable
from functools import partial

import torch

from common.timing import Race, Sustained
from fastpeft.kernels import _cost
from fastpeft.kernels._gpu import Gpu, as_gpu
from fastpeft.kernels._launch import arch_of
from gpu.aims import AIMS
from gpu.model import floor_ratio, ratio
from gpu.parts import able, step
from gpu.stage import Stage
from peers.lora import Case, build
from peers.rows import cases
from tune.tiles import tensors

LAST = "left to the last stage"
WITHOUT = dict.fromkeys(("PEFT base dtype", "torch.compile", "LoRAFusion", "Unsloth"), LAST)
SUSTAINED_ROUNDS, SUSTAINED_S = 2, 0.5


def callables(case: Case, device: str, p: float) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """(steps by name, why a peer is absent): frozen, eager, PEFT, ours as the operator chooses, ours by strategy."""
    peers, absent = build(case, device, (p,), WITHOUT)
    calls = {name: peer.step for name, peer in peers.items() if name != "frozen fp32"}
    t = tensors(case.M, case.N, case.K, case.R, peers["frozen"].x.dtype, device)
    if device == "cuda":  # on a CPU the launchers run under an interpreter, which is no peer of anything
        calls |= {f"ours {name} p={p:g}": partial(step, t, p, "triton", strategy=name) for name in able(device)}
    return calls, {name: why for name, why in absent.items() if why != LAST}


def verdict(case: Case, gpu: Gpu, p: float, strategies: tuple[str, str], arch: _cost.Arch) -> dict[str, float]:
    """What stands beside a ratio: the model's, the floor, and the aim where there is one for this GPU. strategies: of
    the forward and the backward."""
    forward, backward = strategies
    of = (case.M, (case.N, case.K), case.R)
    out = {"model": ratio(*of, p, forward, arch, backward), "floor": floor_ratio(*of, forward, arch, backward)}
    aim = AIMS.get(gpu.name, {}).get(case.name)
    return out | ({"aim": aim} if aim else {})


def strategies_of(name: str, case: Case, gpu: Gpu, p: float) -> tuple[str, str]:
    """That of a row's name, else what the operator chooses for each pass."""
    named = next((s for s in _cost.STRATEGIES if f" {s} " in name), None)
    if named:
        return named, named
    rows = _cost.size_bucket(case.M)
    forward, backward = (
        _cost.choose_strategy(side, rows, case.N, case.K, case.R, p, case.dtype, gpu) for side in _cost.SIDES
    )
    return forward, backward


def run(stage: Stage) -> dict:
    errors: list[str] = []
    rounds = 1 if stage.tiny else 25
    for p in (0.1, 0.0):
        for case in cases(stage.device, stage.tiny):
            name = f"{case.name} p={p:g}"
            if stage.left() < 5:
                errors.append(f"headline {name}: out of time")
                continue
            try:
                calls, absent = callables(case, stage.device, p)
                measure(stage, case, p, calls, absent, rounds)
            except Exception as problem:  # one case that fails does not cost the others
                errors.append(f"headline {name}: {type(problem).__name__}: {str(problem)[:160]}")
    return {"ok": not errors, "errors": errors}


def measure(
    stage: Stage, case: Case, p: float, calls: dict[str, Callable[[], object]], absent: dict[str, str], rounds: int
) -> None:
    burst = Race(calls, stage.device).run(min(6.0, stage.left() / 4), min_rounds=min(5, rounds), max_rounds=rounds)
    _tell(stage, case, p, "burst", burst, absent)
    seconds = 0.01 if stage.tiny else SUSTAINED_S
    if stage.left() > SUSTAINED_ROUNDS * seconds * len(calls) + 3:
        _tell(stage, case, p, "sustained", Sustained(calls, stage.device, seconds).run(SUSTAINED_ROUNDS), absent)


def _tell(stage: Stage, case: Case, p: float, mode: str, race: Race, absent: dict[str, str]) -> None:
    gpu = as_gpu(arch_of(torch.empty(0, device=stage.device)))
    arch = _cost.arch_of(gpu)
    rows = race.summary("frozen")
    beside = {
        name: verdict(case, gpu, p, strategies_of(name, case, gpu, p), arch) for name in rows if name.startswith("ours")
    }
    stage.row("headline", f"{case.name} p={p:g} {mode}", case=case.name, p=p, mode=mode, absent=absent,
              peers={name: row | beside.get(name, {}) for name, row in rows.items()})  # fmt: skip
    stage.say(f"headline {case.name} p={p:g} {mode}: frozen {1e6 * rows['frozen']['median_s']:.1f} us; over it:")
    for name, row in rows.items():
        told = ", ".join(f"{what} {value:.3f}" for what, value in beside.get(name, {}).items())
        stage.say(f"  {name:24} {row['ratio']:.3f} [{row['ratio_q1']:.3f}, {row['ratio_q3']:.3f}]  {told}")
    for name, why in absent.items():
        stage.say(f"  {name:24} absent: {why}")
