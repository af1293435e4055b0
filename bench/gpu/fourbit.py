"""4-bit weights on a GPU beside bitsandbytes and the frozen 16-bit linear, in one run; a stage of `make gpu`.

Timed: dequantise alone; y = x Wᵀ from 1 to 2048 rows; a QLoRA layer's forward and backward. Every case is written when
it is done, and a run takes up those that an earlier one of the same sources and GPU has left.
Bounds: share of the bytes' time at the measured copy rate, where bytes are what a case must move at least.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from common import tree
from common.roofline import copy_bandwidth
from common.timing import Race
from fastpeft import dispatch, ops
from gpu.aims import LORA_16
from gpu.stage import Stage

OP = "linear4bit"
SCALE, RANK = 2.0, 16


@dataclass(frozen=True)
class Case:
    kind: str  # "dequantize", "forward" or "lora"
    M: int
    N: int
    K: int

    @property
    def base(self) -> str:
        """The peer that ratios are taken to."""
        return "16-bit copy" if self.kind == "dequantize" else "16-bit frozen"

    @property
    def name(self) -> str:
        return f"{self.kind} {self.M}x{self.K}->{self.N}" if self.M else f"{self.kind} {self.N}x{self.K}"

    def least_seconds(self, itemsize: int, rates: dict[str, float]) -> float:
        """Its bytes at the copy rate, or its FLOP at the GEMM rate where that is longer and was measured."""
        flop = {"dequantize": 0, "forward": 2, "lora": 4}[self.kind] * self.M * self.N * self.K
        return max(self.least_bytes(itemsize) / rates["copy_bytes_per_s"],
                   flop / rates.get("gemm_bf16_flop_per_s", float("inf")))  # fmt: skip

    def least_bytes(self, itemsize: int) -> int:
        packed = self.N * self.K // 2 + self.N * self.K // 64
        if self.kind == "dequantize":
            return packed + itemsize * self.N * self.K
        passes = 1 if self.kind == "forward" else 2
        return passes * (packed + itemsize * self.M * (self.N + self.K))


def cases(tiny: bool) -> list[Case]:
    """A QLoRA layer's step first: what users pay. Around 64 rows the packed bytes stop paying."""
    if tiny:
        return [Case("lora", 70, 64, 128), Case("dequantize", 0, 64, 128), Case("forward", 4, 64, 128)]
    out = [Case("lora", m, 14336, 4096) for m in (2048, 8192)] + [Case("lora", 2048, 4096, 4096)]
    out += [Case("dequantize", 0, n, k) for n, k in ((14336, 4096), (4096, 4096))]
    return out + [Case("forward", m, n, k) for m in (1, 16, 64, 256, 2048) for n, k in ((14336, 4096), (4096, 14336))]


def _able(device: str, dtype: torch.dtype) -> list[str]:
    names = ("cuda", "triton") if device == "cuda" else ("cpp", "eager")
    return [name for name in names if dispatch.unmet("linear4bit_fwd", name, device, dtype) is None]


def peers(case: Case, device: str, dtype: torch.dtype) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """(callables by name, why a peer is absent by name)."""
    gen = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=gen, device=device) * std).to(dtype)

    w = normal(case.N, case.K, std=case.K**-0.5)
    weight, absent = ops.quantize_4bit(w), {}
    able = _able(device, dtype)
    try:
        import bitsandbytes

        data, state = weight.to_quant_state()
    except ImportError as missing:
        bitsandbytes, absent["bitsandbytes"] = None, str(missing)
    if case.kind == "dequantize":
        out = torch.empty_like(w)
        calls: dict[str, Callable[[], object]] = {case.base: lambda: out.copy_(w)}
        calls |= {f"ours {b}": lambda b=b: ops.dequantize_4bit(weight, dtype, out=out, backend=b) for b in able}
        if bitsandbytes:
            calls["bitsandbytes"] = lambda: bitsandbytes.functional.dequantize_4bit(data, state)
        return calls, absent
    x = normal(case.M, case.K)
    if case.kind == "forward":
        calls = {case.base: lambda: torch.nn.functional.linear(x, w)}
        calls |= {f"ours {b}": lambda b=b: ops.linear4bit(x, weight, backend=b) for b in able}
        if bitsandbytes:
            calls["bitsandbytes"] = lambda: bitsandbytes.matmul_4bit(x, data.t(), quant_state=state)
        return {name: _without_gradients(call) for name, call in calls.items()}, absent
    dy, x = normal(case.M, case.N), x.requires_grad_()
    a = normal(RANK, case.K, std=case.K**-0.5).requires_grad_()
    b = normal(case.N, RANK, std=0.05).requires_grad_()

    def step(forward: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    linear = torch.nn.functional.linear
    calls = {case.base: step(lambda: linear(x, w), x)}
    calls[LORA_16] = step(lambda: ops.lora_linear(x, w, a, b, scale=SCALE), x, a, b)
    for name in able:
        calls[f"ours {name}"] = step(
            lambda name=name: ops.linear4bit_lora(x, weight, a, b, scale=SCALE, backend=name), x, a, b
        )
    if bitsandbytes:
        product = lambda: bitsandbytes.matmul_4bit(x, data.t(), quant_state=state)  # noqa: E731
        calls["bitsandbytes frozen"] = step(product, x)
        # What PEFT's layer does: a copy of the base product, then the adapter's three passes over y.
        calls["bitsandbytes + PEFT's adapter"] = step(
            lambda: product().clone() + linear(linear(x, a), b) * SCALE, x, a, b
        )
    return calls, absent


def _without_gradients(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def run(stage: Stage) -> dict:
    """Every case not done yet (fresh: every case), until the time is spent; each on disk before the next."""
    device, tiny = stage.device, stage.tiny
    path = tree.RESULTS / f"{OP}_{device}{'_tiny' if tiny else ''}.json"
    environment, stamp = tree.environment(device), tree.stamp(device)
    data = {"op": OP, "stamp": stamp, "environment": environment, "cases": {}, "left_out": []}
    if path.exists() and not stage.fresh:
        loaded = json.loads(path.read_text())
        data["cases"] = loaded["cases"] if loaded.get("stamp") == stamp else {}
    roof = stage.rows().get(("roof", "roof")) or {"copy_bytes_per_s": copy_bandwidth(device, tiny)}
    data["roof"] = roof
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for case in cases(tiny):
        if case.name in data["cases"]:
            continue
        if stage.left() <= 2:
            data["left_out"].append(f"{case.name}: out of time")
            continue
        try:
            calls, absent = peers(case, device, dtype)
            least, most = (1, 1) if tiny else (5, 30)
            race = Race(calls, device).run(min(2.0, stage.left() / 4), least, most)
        except Exception as error:  # one case that fails does not cost the others
            data["left_out"].append(f"{case.name}: {type(error).__name__}: {str(error)[:160]}")
            continue
        rows = race.summary(case.base)
        least = case.least_seconds(dtype.itemsize, roof)
        for row in rows.values():
            row["roof_share"] = least / row["median_s"]
        data["cases"][case.name] = {**asdict(case), "peers": rows, "absent": absent}
        tree.save_json(path.stem, data)
        us = {name: row["median_s"] * 1e6 for name, row in rows.items()}
        stage.row("fourbit", case.name, us=us, floor_us=1e6 * least, absent=absent)
        stage.say(
            f"{case.name}: " + ", ".join(f"{n} {each:.0f} us" for n, each in us.items()) + f"; floor {1e6 * least:.0f}"
        )
    tree.save_json(path.stem, data)
    return {"ok": not data["left_out"], "errors": data["left_out"]}
