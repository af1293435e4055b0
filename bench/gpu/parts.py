"""Each kernel of a LoRA step by itself: measured, what the cost model says, its floor, and its error against fp32.

Passes at the shapes of the README, p = 0 and 0.1, the vendor's GEMM with beta 0 and 1, the fused GEMMs, whole steps.
The floor is bytes at the copy rate, or FLOP at the GEMM rate, both measured here first.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from common.roofline import copy_bandwidth, gemm_rate
from common.timing import Race
from fastpeft import dispatch
from fastpeft.kernels import _cost
from fastpeft.kernels._launch import arch_of
from fastpeft.testing import error
from gpu.stage import Stage
from tune.tiles import SCALE, P, tensors

RANK = 16
SHAPES = ((8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336))  # M, N, K
NEEDS = (True, True, True, False)
ROUNDS = 15
Outputs = tuple[Tensor, ...]


class Part(NamedTuple):
    """model_s, floor_s: seconds. exact: the same of fp32 operands."""

    call: Callable[[], object]
    exact: Callable[[], object]
    model_s: float
    floor_s: float


def dtype_of(device: str) -> torch.dtype:
    """bf16; fp16 under the interpreter, which multiplies bf16 operands as the integers of their bits."""
    return torch.float16 if device == "cpu" else torch.bfloat16


def shapes(tiny: bool) -> tuple[tuple[int, int, int], ...]:
    return ((17, 64, 64),) if tiny else SHAPES


def step(t: SimpleNamespace, p: float, backend: str, **strategy: str) -> Outputs:
    """y, dx, da and db of one training step by a backend's launchers."""
    forward, backward = (dispatch.load(op, backend) for op in ("lora_linear_fwd", "lora_linear_bwd"))
    seed = t.seed if p else None
    y, s = forward(t.x, t.w, t.a, t.b, None, None, SCALE, p, seed, **strategy)
    return y, *backward(t.dy, t.x, t.w, t.a, t.b, s, SCALE, p, seed, *NEEDS, **strategy)[:3]


def in_fp32(t: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(**{name: v.float() if v.is_floating_point() else v for name, v in vars(t).items()})


def parts(t: SimpleNamespace, p: float, rates: dict[str, float], strategies: tuple[str, ...]) -> dict[str, Part]:
    """By name; those that p does not change only at p = 0. The launchers' results beside the reference's in fp32."""
    (M, K), (N, R) = t.x.shape, t.b.shape
    wide, seed, arch = in_fp32(t), t.seed if p else None, _cost.arch_of(arch_of(t.x))
    y, dx = torch.zeros_like(t.dy), torch.zeros_like(t.x)

    def passed(name: str, op: str, *of: object) -> Part:
        """One primitive; `of`: its arguments, tensors by name."""
        ours, gold = ([getattr(s, each) if isinstance(each, str) else each for each in of] for s in (t, wide))
        model_s = _cost.pass_time(name, M, N, K, R, p, "bf16", arch)
        floor_s = _cost.pass_bytes(name, M, N, K, R, 2) / rates["copy_bytes_per_s"]
        run, exact = dispatch.load(op, "triton"), dispatch.load(op, "eager")
        return Part(lambda: run(*ours), lambda: exact(*gold), model_s, floor_s)

    def product(call: Callable[[], object], exact: Callable[[], object], model_s: float) -> Part:
        return Part(call, exact, model_s, 2 * M * N * K / rates["gemm_bf16_flop_per_s"])

    out = {
        "shrink": passed("shrink", "lora_shrink", "x", "a", p, seed),
        "grad_a": passed("grad_a", "lora_grad_a", "x", "ds", "a", p, seed, False, True),
        "grad_a with dx": passed("grad_a_dx", "lora_grad_a", "x", "ds", "a", p, seed, True, True),
    }
    frozen = 4 * M * N * K / rates["gemm_bf16_flop_per_s"]
    if not p:
        gemm = _cost.gemm_time(M, N, K, "bf16", arch), _cost.gemm_time(M, K, N, "bf16", arch)
        forward, backward = (lambda: wide.x @ wide.w.t()), (lambda: wide.dy @ wide.w)
        none = lambda: ()  # noqa: E731 - what beta = 1 adds to differs from call to call
        out |= {
            "expand": passed("expand", "lora_expand", "s", "b", None, None, SCALE),
            "grad_b": passed("grad_b", "lora_grad_b", "dy", "s", "b", SCALE, True, False),
            "GEMM fwd": product(lambda: torch.mm(t.x, t.w.t(), out=y), forward, gemm[0]),
            "GEMM fwd beta 1": product(lambda: y.addmm_(t.x, t.w.t(), alpha=1e-6), none, gemm[0]),
            "GEMM dX": product(lambda: torch.mm(t.dy, t.w, out=dx), backward, gemm[1]),
            "GEMM dX beta 1": product(lambda: dx.addmm_(t.dy, t.w, alpha=1e-6), none, gemm[1]),
        }
    if "fused" in strategies:
        fused = (dispatch.load(f"lora_linear_fused_{side}", "triton") for side in ("fwd", "dx"))
        exact = (dispatch.load(f"lora_linear_fused_{side}", "eager") for side in ("fwd", "dx"))
        (fwd, back), (fwd_exact, back_exact) = fused, exact
        out["fused dX"] = product(
            lambda: back(t.dy, t.w, t.ds, t.a, p, seed),
            lambda: back_exact(wide.dy, wide.w, wide.ds, wide.a, p, seed),
            _cost.fused_gemm_time(M, K, N, R, "bf16", arch, p),
        )
        if not p:
            out["fused fwd"] = product(
                lambda: fwd(t.x, t.w, t.s, t.b, None, None, SCALE),
                lambda: fwd_exact(wide.x, wide.w, wide.s, wide.b, None, None, SCALE),
                _cost.fused_gemm_time(M, N, K, R, "bf16", arch),
            )
    for name in strategies:
        said = _cost.predict(M, N, K, R, p, arch=arch, strategy=name)["total"]
        passes = ("shrink", "expand", "grad_b", "grad_a_dx") if name == "accumulate" else ("shrink", "grad_b", "grad_a")
        moved = sum(_cost.pass_bytes(each, M, N, K, R, 2) for each in passes)
        out[f"step {name}"] = Part(
            lambda name=name: step(t, p, "triton", strategy=name), lambda: step(wide, p, "eager"), said,
            frozen + moved / rates["copy_bytes_per_s"],
        )  # fmt: skip
    return out


def _worst(ours: object, exact: object) -> float | None:
    """Largest difference over the largest value, of all outputs; None where nothing is compared."""

    def flat(result: object) -> list[Tensor]:
        found = result if isinstance(result, tuple) else (result,)
        return [each for each in found if isinstance(each, Tensor) and each.numel()]

    pairs = list(zip(flat(ours), flat(exact), strict=False))
    return max((error(a, b) / max(float(b.abs().max()), 1e-30) for a, b in pairs), default=None)


def able(device: str) -> tuple[str, ...]:
    """The strategies that serve here."""
    if device == "cuda" and dispatch.unmet("lora_linear_fused_fwd", "triton", "cuda", torch.bfloat16):
        return ("accumulate",)
    return ("accumulate", "fused")


def launch_all(strategies: tuple[str, ...]) -> None:
    """What the stage launches, on meta tensors: what has to be compiled for it."""
    ones = {"copy_bytes_per_s": 1.0, "gemm_bf16_flop_per_s": 1.0}
    half, single = torch.bfloat16, torch.float32
    for M, N, K in SHAPES:
        sizes = {
            "x": (M, K),
            "w": (N, K),
            "dy": (M, N),
            "s": (M, RANK),
            "ds": (M, RANK),
            "a": (RANK, K),
            "b": (N, RANK),
        }
        made = {n: torch.empty(s, dtype=single if n in "ab" else half, device="meta") for n, s in sizes.items()}
        t = SimpleNamespace(**made, seed=torch.empty(1, dtype=torch.int64, device="meta"))
        for p in (0.0, P):
            for part in parts(t, p, ones, strategies).values():
                part.call()


def run(stage: Stage) -> dict:
    rates = {
        "copy_bytes_per_s": copy_bandwidth(stage.device, stage.tiny),
        "gemm_bf16_flop_per_s": gemm_rate(stage.device, dtype_of(stage.device), stage.tiny),
    }
    stage.row("roof", "roof", **rates)
    copy, gemm = rates.values()
    stage.say(f"parts: copies {copy / 1e12:.2f} TB/s, GEMM {gemm / 1e12:.0f} TFLOP/s")
    stage.say(f"{'part':44} {'model us':>9} {'measured':>9} {'floor':>8}   error")
    errors = []
    for M, N, K in shapes(stage.tiny):
        for p in (0.0, P):
            label = f"{M}x{K}->{N} p={p:g}"
            if stage.left() < 3:
                errors.append(f"parts {label}: out of time")
                continue
            t = tensors(M, N, K, RANK if not stage.tiny else 4, dtype_of(stage.device), stage.device)
            found, wrong = parts(t, p, rates, able(stage.device)), {}
            for name, part in list(found.items()):
                try:
                    wrong[name] = _worst(part.call(), part.exact())
                except Exception as problem:  # one kernel that fails does not cost the others
                    errors.append(f"parts {name} {label}: {type(problem).__name__}: {str(problem)[:160]}")
                    del found[name]
            rounds = 1 if stage.tiny else ROUNDS
            race = Race({name: part.call for name, part in found.items()}, stage.device)
            race.run(min(6.0, stage.left() / 3), min_rounds=min(5, rounds), max_rounds=rounds)
            for name, row in race.summary(next(iter(found))).items():
                part = found[name]
                stage.row("part", f"{label} {name}", us=1e6 * row["median_s"], q1_us=1e6 * row["q1_s"],
                          q3_us=1e6 * row["q3_s"], model_us=1e6 * part.model_s, floor_us=1e6 * part.floor_s,
                          error=wrong[name])  # fmt: skip
                told = "" if wrong[name] is None else f"{wrong[name]:.1e}"
                figures = f"{1e6 * part.model_s:9.1f} {1e6 * row['median_s']:9.1f} {1e6 * part.floor_s:8.1f}"
                stage.say(f"{f'{label} {name}':44} {figures}   {told}")
            del t, found, race
    return {"ok": not errors, "errors": errors}
