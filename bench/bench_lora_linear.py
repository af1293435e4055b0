"""LoRA linear, forward + backward, beside the frozen linear and every peer, in one run.

    make bench OP=lora_linear        or, without pytest:  python bench/bench_lora_linear.py [--device cuda] [--tiny]

Measured, by peers/rows.py: ratio to the frozen linear's forward + dX · host time of a tiny call · bytes kept for
backward by a q/k/v triple · bytes and FLOP our launches move, counted on meta tensors · share of the measured roof.
"""

import argparse

import torch

from common.report import plot, result_tables
from peers.lora import build
from peers.rows import DROPOUTS, OP, case_result, cases, host_peers, kept_result, left_out, new_results, run

__all__ = ["OP", "cases", "new_results", "plot"]  # what conftest.py reads off this module


def test_case(case, race, results, device):
    peers, absent = build(case, device, DROPOUTS, left_out(case, device))
    raced = race({name: peer.step for name, peer in peers.items()})
    results["cases"].append(case_result(case, raced, peers, absent, results["roof"], device))


def test_host_time(race, results, device, tiny):
    sides, absent = host_peers(device)
    # perf_counter on either device: it is the host's time, and a queue of 4 x 8 products never fills.
    raced = race(sides, calls=5 if tiny else 200, budget_s=10.0, clock="cpu")
    results["host"] = {"peers": raced.summary("nn.Linear fwd"), "absent": absent}


def test_kept_for_backward(benchmark, results, device, tiny):
    results["kept"] = benchmark.pedantic(kept_result, args=(device, tiny), rounds=1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="time budget of one case")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries the benchmark itself")
    args = parser.parse_args(argv)
    print(result_tables(run(args.device, args.tiny, args.seconds)))


if __name__ == "__main__":
    main()
