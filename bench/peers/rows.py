"""A LoRA linear, forward + backward, beside the frozen linear and every peer: the rows of bench_lora_linear.py.

Ratio to the frozen linear's forward + dX · host time of a tiny call · bytes kept for backward by a q/k/v triple ·
bytes and FLOP our launches move, counted on meta tensors · share of this machine's measured roof.
"""

import time
from dataclasses import replace

import torch

from common import tree
from common.report import plot
from common.roofline import measure
from common.timing import Race, kept_bytes, peak_bytes, steady_cpu
from peers.lora import SCALE, Case, build, ours_layer, peft_layer

OP = "lora_linear"
DROPOUTS = (0.0, 0.1)
HOST_WITHOUT = dict.fromkeys(("torch.compile", "LoRAFusion", "Unsloth", "PEFT base dtype"), "not a peer in host time")


def cases(device: str, tiny: bool = False) -> list[Case]:
    if tiny:
        return [Case("fp32", 32, 48, 40, 4, compile=False)]
    if device == "cuda":
        shapes = [(4096, 4096, 16), (4096, 14336, 16), (14336, 4096, 16), (4096, 4096, 64)]
        return [Case("bf16", 8192, k, n, r, compile=r == 16) for k, n, r in shapes]
    return [
        Case("bf16", 512, 1024, 1024, 16), Case("bf16", 2048, 768, 768, 8, compile=False),
        Case("bf16", 512, 768, 3072, 8, compile=False), Case("fp32", 512, 1024, 1024, 16),
    ]  # fmt: skip


def left_out(case: Case, device: str) -> dict[str, str]:
    """Peers to skip where torch's bf16 GEMM is a fallback of seconds a call, so that a run stays within minutes."""
    if device == "cpu" and case.dtype == "bf16" and not case.compile and not tree.mkldnn_bf16():
        return dict.fromkeys(("eager", "PEFT base dtype"), "time: bf16 takes seconds a call here; see the first case")
    return {}


def new_results(device: str, tiny: bool = False, roof: dict | None = None) -> dict:
    """roof: measured before, or None to measure it here."""
    if device == "cpu":
        steady_cpu()
    data = {"op": OP, "environment": tree.environment(device), "roof": roof or measure(device, tiny)}
    data |= {"notes": [], "cases": [], "left_out": []}
    if device == "cpu" and not tree.mkldnn_bf16():
        data["notes"].append("torch has no native bf16 GEMM on this CPU (no AVX-512): its bf16 frozen linear runs a "
                             "scalar fallback, so bf16 ratios say little here; see the frozen fp32 row")  # fmt: skip
    return data


def roof_seconds(case: Case, roof: dict, which: str) -> float:
    """Least time for the step's arithmetic or its bytes, whichever is longer, at the measured roofs."""
    rate = roof[f"gemm_{'fp32' if case.dtype == 'fp32' else 'bf16'}_flop_per_s"]
    itemsize = 4 if case.dtype == "fp32" else 2
    moved = itemsize * 2 * (case.M * case.K + case.M * case.N + case.N * case.K)
    return max(case.flop[which] / rate, moved / roof["copy_bytes_per_s"])


def case_result(case: Case, race: Race, peers: dict, absent: dict, roof: dict, device: str) -> dict:
    """One case's row: per peer the time, spread, ratio to frozen, share of the roof and peak memory on CUDA."""
    rows = race.summary("frozen")
    for name, row in rows.items():
        if name != "frozen fp32":
            which = "frozen" if name == "frozen" else "lora"
            row["roof_share"] = roof_seconds(case, roof, which) / row["median_s"]
        if device == "cuda":
            row["peak_bytes"] = peak_bytes(peers[name].step)
    if "frozen fp32" in race.samples:
        for name, row in race.summary("frozen fp32").items():
            rows[name]["ratio_fp32"] = row["ratio"]
    return {"case": case.name, **case.__dict__, "peers": rows, "absent": absent, "counted": counted(case)}


def counted(case: Case) -> dict | str:
    """Bytes and FLOP of our launches for one training step, by strategy; no device is touched (meta tensors)."""
    try:
        from fastpeft.kernels import lora_linear
        from fastpeft.kernels._launch import count_launches
    except ImportError as error:
        return f"not counted: {error}"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case.dtype]
    x, w, dy = (torch.empty(s, dtype=dtype, device="meta")
                for s in ((case.M, case.K), (case.N, case.K), (case.M, case.N)))  # fmt: skip
    a, b = (torch.empty(s, device="meta") for s in ((case.R, case.K), (case.N, case.R)))
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    out = {}
    for strategy in ("accumulate", "fused") if case.dtype != "fp32" else ("accumulate",):
        with count_launches() as launches:
            _, s = lora_linear.lora_linear_fwd(x, w, a, b, None, None, SCALE, 0.1, seed, strategy=strategy)
            lora_linear.lora_linear_bwd(dy, x, w, a, b, s, SCALE, 0.1, seed, True, True, True, False, strategy=strategy)
        out[strategy] = {
            "launches": len(launches), "flop": sum(launch.flop for launch in launches),
            "bytes": sum(launch.read_bytes + launch.written_bytes for launch in launches),
            "weight_bytes": sum(launch.weight_bytes for launch in launches),
            "scratch_bytes": sum(launch.scratch_bytes for launch in launches),
        }  # fmt: skip
    return out


def host_peers(device: str) -> tuple[dict, dict]:
    """Tiny calls (x [4, 8], W [8, 8], fp32, no dropout), by name: what is left of them is the host's time."""
    case = Case("fp32", 4, 8, 8, 4)
    peers, absent = build(case, device, (0.0,), HOST_WITHOUT)
    base = peers["frozen"]
    linear = torch.nn.Linear(8, 8, bias=False, device=device)
    linear.weight = torch.nn.Parameter(base.weight, requires_grad=False)
    layer = ours_layer(base.weight, case, 0.0)
    peers["nn.Linear"] = replace(base, forward=linear, params=())
    peers["ours LoRALinear"] = replace(
        base, forward=layer, params=tuple(q for q in layer.parameters() if q.requires_grad)
    )
    del peers["frozen"]
    absent = {name: why for name, why in absent.items() if name not in HOST_WITHOUT}
    sides = {f"{name} fwd": peer.infer for name, peer in peers.items()}
    return sides | {f"{name} fwd+bwd": peer.step for name, peer in peers.items()}, absent


def kept_result(device: str, tiny: bool) -> dict:
    """Bytes per token and channel of x that a q/k/v triple keeps for backward; x itself (2 in bf16) included."""
    case = Case("bf16", 8, 32, 32, 4) if tiny else Case("bf16", 512 if device == "cpu" else 8192, 1024, 1024, 16)
    gen = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(case.M, case.K, device=device, generator=gen).bfloat16().requires_grad_()
    weights = [torch.randn(case.N, case.K, device=device, generator=gen).bfloat16() for _ in range(3)]
    makers = {
        "PEFT": lambda w: peft_layer(w, case, 0.1, True), "PEFT base dtype": lambda w: peft_layer(w, case, 0.1, False),
        "ours": lambda w: ours_layer(w, case, 0.1),
    }  # fmt: skip
    out: dict = {"case": f"q/k/v {case.name} p=0.1", "x_bytes": 2 * x.numel(), "s_bytes": 3 * 2 * case.M * case.R}
    for name, make in makers.items():
        try:
            layers = [make(w) for w in weights]
        except ImportError as missing:
            out[name] = f"absent: {missing}"
            continue
        own = [parameter for layer in layers for parameter in layer.parameters()]
        total = kept_bytes(lambda layers=layers: [layer(x) for layer in layers], own)
        out[name] = {"bytes": total, "per_element_of_x": total / x.numel()}
    return out


def run(
    device: str, tiny: bool = False, budget_s: float | None = None, total_s: float = float("inf"), progress=print
) -> dict:
    """The same measurements without pytest, for a machine that has none of its plugins. Returns the results.

    budget_s: rounds of one case; total_s: after three quarters of it no further case is begun ("left_out" names them).
    """
    started = time.monotonic()
    budget_s = budget_s or (6.0 if device == "cuda" else 20.0)
    data = new_results(device, tiny)
    for case in cases(device, tiny):
        if time.monotonic() - started > 0.75 * total_s:
            data["left_out"].append(f"{case.name}: out of time")
            continue
        peers, absent = build(case, device, DROPOUTS, left_out(case, device))
        raced = Race({name: peer.step for name, peer in peers.items()}, device).run(budget_s)
        data["cases"].append(case_result(case, raced, peers, absent, data["roof"], device))
        progress(f"bench: {case.name} done")
        tree.save_json(f"{OP}_{device}" + ("_tiny" if tiny else ""), data)
        del peers, raced
        if device == "cuda":
            torch.cuda.empty_cache()
    sides, absent = host_peers(device)
    raced = Race(sides, "cpu", calls=5 if tiny else 200).run(min(budget_s, 10.0))
    data["host"] = {"peers": raced.summary("nn.Linear fwd"), "absent": absent}
    data["kept"] = kept_result(device, tiny)
    path = tree.save_json(f"{OP}_{device}" + ("_tiny" if tiny else ""), data)
    plot(data, path.with_suffix(".png"))
    return data
