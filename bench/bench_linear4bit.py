"""4-bit weights beside bitsandbytes, PEFT and the bf16 linear, in one run on one thread.

    make bench OP=linear4bit        or, without pytest:  python bench/bench_linear4bit.py [--seconds S] [--tiny]

NF4 in blocks of 64, absmax in 8 bits. Measured: dequantisation beside a copy of as many bytes, into fresh pages, as
glibc has for 32 MiB, and, last, into kept ones · quantisation · the forward of few rows in training mode, the weight
from memory or, in a loop, from a cache · forward + backward of a QLoRA layer beside our own over bf16 · bytes kept for
backward and the allocator's peak. Before anything is timed, bytes must equal bitsandbytes' and products agree with
PEFT's. On a CPU only: `make gpu` has the GPU's.
"""

import argparse

from common import tree
from common.report import plot, result_tables
from common.roofline import measure
from common.timing import Race, kept_bytes, peak_cpu_bytes, steady_cpu
from peers.fourbit import BASES, KEPT, KINDS, LOOP, Case, Field, build

OP = "linear4bit"
__all__ = ["OP", "cases", "new_results", "plot"]  # what conftest.py reads off this module


def cases(device: str, tiny: bool = False) -> list[Case]:
    if device != "cpu":
        return []
    size, few, many = (64, (3,), (5,)) if tiny else (4096, (1, 16, 64), (256, 1024))
    rank = 4 if tiny else 16
    out = [Case(kind, 0, size, size, rank) for kind in ("dequantise", "quantise")]
    out += [Case("forward", m, size, size, rank) for m in few]
    out += [Case(LOOP, few[0], size, size, rank)]
    out += [Case("step", m, size, size, rank) for m in many]
    return [*out, Case(KEPT, 0, size, size, rank)]


def new_results(device: str, tiny: bool = False) -> dict:
    steady_cpu()
    data = {"op": OP, "environment": tree.environment("cpu"), "roof": measure("cpu", tiny), "notes": [], "cases": []}
    if not tree.mkldnn_bf16():
        data["notes"].append("torch has no native bf16 GEMM on this CPU (no AVX-512): it runs a scalar fallback, which "
                             "is all that peers other than ours have for their products")  # fmt: skip
    return data


def case_result(case: Case, race: Race, field: Field, roof: dict) -> dict:
    """One case's row: per peer time, spread, ratio to the base, share of the roof, speed beside what it replaces."""
    base = BASES[case.kind] if BASES[case.kind] in field.peers else "ours"
    rows = race.summary(base)
    for name, row in rows.items():
        peer = field.peers[name]
        roofed = case.least_seconds(roof, field.packed_bytes if peer.four_bit else None, peer.adapted)
        row["roof_share"] = roofed / row["median_s"]
        row["peak_bytes"] = peak_cpu_bytes(peer.call)
        if peer.forward:
            row["kept_bytes"] = kept_bytes(peer.forward, peer.own)
        if peer.against in rows:
            row["faster"] = {peer.against: 1 / race.summary(peer.against)[name]["ratio"]}
    known = {"case": case.name, **case.__dict__, "what": KINDS[case.kind], "base": base}
    return known | {"packed_bytes": field.packed_bytes, "peers": rows, "absent": field.absent,
                    "agreement": field.agreement}  # fmt: skip


def test_case(case, race, results, device):
    field = build(case)
    raced = race({name: peer.call for name, peer in field.peers.items()}, case.calls)
    results["cases"].append(case_result(case, raced, field, results["roof"]))


def run(tiny: bool = False, budget_s: float = 20.0, progress=print) -> dict:
    """The same measurements without pytest. budget_s: rounds of one case. Returns the results."""
    data = new_results("cpu", tiny)
    name = f"{OP}_cpu" + ("_tiny" if tiny else "")
    for case in cases("cpu", tiny):
        field = build(case)
        raced = Race({name: peer.call for name, peer in field.peers.items()}, calls=case.calls).run(budget_s)
        data["cases"].append(case_result(case, raced, field, data["roof"]))
        progress(f"bench: {case.name} done")
        path = tree.save_json(name, data)
        del field, raced
    plot(data, path.with_suffix(".png"))
    return data


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="time budget of one case")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries the benchmark itself")
    args = parser.parse_args(argv)
    print(result_tables(run(args.tiny, args.seconds)))


if __name__ == "__main__":
    main()
