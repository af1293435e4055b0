"""Recurrent layers with LoRA, forward + backward, beside the frozen layer with dX, in one run.

make bench OP=lora_lstm        or, without pytest:  python bench/bench_lora_lstm.py [--seconds 5] [--tiny]

40 → 256, 100 steps, rank 16, fp32, one thread: LSTM of 1, 8 and 32 sequences, GRU and RNN of 32. Beside ours over the
whole sequence stands the same with a cell at every step, unmerged.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fastpeft
from common import tree
from common.report import plot, result_tables
from common.timing import Race, steady_cpu

OP = "lora_lstm"
KINDS = {
    "LSTM": (nn.LSTM, fastpeft.LoRALSTM, fastpeft.LoRALSTMCell),
    "GRU": (nn.GRU, fastpeft.LoRAGRU, fastpeft.LoRAGRUCell),
    "RNN": (nn.RNN, fastpeft.LoRARNN, fastpeft.LoRARNNCell),
}
__all__ = ["OP", "cases", "new_results", "plot"]  # what conftest.py reads off this module


@dataclass(frozen=True)
class Case:
    kind: str
    N: int
    T: int = 100
    K: int = 40
    H: int = 256
    R: int = 16

    @property
    def name(self) -> str:
        return f"{self.kind} {self.K} to {self.H}, {self.T} steps of {self.N}, r={self.R}"


def cases(device: str, tiny: bool = False) -> list[Case]:
    if tiny:
        return [Case("LSTM", 2, 3, 4, 8, 2)]
    return [Case("LSTM", 1), Case("LSTM", 8), Case("LSTM", 32), Case("GRU", 32), Case("RNN", 32)]


def new_results(device: str, tiny: bool = False) -> dict:
    if device == "cpu":
        steady_cpu()
    notes = ["the loop of an LSTM is oneDNN's, whose backward gives dW whether it is asked for or not; of GRU and RNN "
             "ATen's where frozen, ours with LoRA"]  # fmt: skip
    return {"op": OP, "environment": tree.environment(device), "notes": notes, "cases": [], "left_out": []}


def build(case: Case, device: str) -> dict[str, Callable[[], object]]:
    """Steps by peer: the loss is a given dy, gradients go to x and to what is trained."""
    torch.manual_seed(0)
    torchs, ours, cell = KINDS[case.kind]
    base = torchs(case.K, case.H, device=device).requires_grad_(False)
    x = torch.randn(case.T, case.N, case.K, device=device, requires_grad=True)
    dy = torch.randn(case.T, case.N, case.H, device=device)

    def steps(module: nn.Module) -> Callable[[], object]:
        leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(module(x)[0], leaves, dy)

    layers = {f"ours p={p}": ours.from_rnn(copy.deepcopy(base), rank=case.R, dropout=p) for p in (0.0, 0.1)}
    loop = cell(case.K, case.H, case.R, device=device)

    def unrolled(x: torch.Tensor) -> tuple[torch.Tensor]:
        state, found = None, []
        for step in x:
            state = loop(step, state)
            found.append(state[0] if case.kind == "LSTM" else state)
        return (torch.stack(found),)

    held = [x, *(p for p in loop.parameters() if p.requires_grad)]
    peers = {"frozen": steps(base)} | {name: steps(layer) for name, layer in layers.items()}
    return peers | {"ours, a cell a step": lambda: torch.autograd.grad(unrolled(x)[0], held, dy)}


def case_result(case: Case, race: Race) -> dict:
    counted = "not counted: one copy of each weight is written, read and differentiated a sequence"
    return {"case": case.name, **case.__dict__, "peers": race.summary("frozen"), "absent": {}, "counted": counted}


def test_case(case, race, results, device):
    results["cases"].append(case_result(case, race(build(case, device), budget_s=5.0)))


def run(device: str, tiny: bool = False, budget_s: float | None = None) -> dict:
    """The same measurements without pytest. ``budget_s``: seconds of rounds for one case."""
    data = new_results(device, tiny)
    for case in cases(device, tiny):
        data["cases"].append(case_result(case, Race(build(case, device), device).run(budget_s or 5.0)))
    path = tree.save_json(f"{OP}_{device}" + ("_tiny" if tiny else ""), data)
    plot(data, path.with_suffix(".png"))
    return data


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="time budget of one case")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries the benchmark itself")
    args = parser.parse_args(argv)
    print(result_tables(run(args.device, args.tiny, args.seconds)))


if __name__ == "__main__":
    main()
