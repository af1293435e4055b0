"""The variants of LoRA beside what they are measured against, forward + backward, on one thread of a CPU.

    make bench OP=variants    or, without pytest:  python bench/bench_variants.py [--seconds 20] [--clock process]

Sparse and attention-guided LoRA over LoRALinear · AdaLoRA over LoRA for many tiny layers, and its allocator beside
PEFT's · AdapterFusion over its definition written out. Ratios are taken round by round (`timing.Race`).
"""

import argparse
import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fastpeft
from common import tree
from common.report import plot, result_tables
from common.timing import Race, steady_cpu

OP = "variants"
__all__ = ["OP", "cases", "new_results", "plot"]  # what conftest.py reads off this module

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """name; what is timed; the peer that ratios are over; its peers, made on demand."""

    name: str
    what: str
    base: str
    make: Callable[[bool], dict[str, Step]]


def _step(module: nn.Module, x: torch.Tensor, extra: Callable[[], torch.Tensor] | None = None) -> Step:
    parameters = [p for p in module.parameters() if p.requires_grad]

    def run() -> None:
        for p in parameters:
            p.grad = None
        loss = module(x).square().mean()
        (loss if extra is None else loss + 0.1 * extra()).backward()

    return run


def _linear(tiny: bool, dtype: torch.dtype) -> dict[str, Step]:
    M, K, N, r = (16, 32, 24, 4) if tiny else (512, 1024, 1024, 16)
    torch.manual_seed(0)
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)

    def made(kind: type, **options: object) -> nn.Module:
        layer = kind.from_linear(nn.Linear(K, N, dtype=dtype), rank=r, dropout=0.0, **options)
        nn.init.normal_(layer.lora_B, std=0.1)
        return layer

    sparse = made(fastpeft.SparseLoRALinear)
    sparse.remask()
    layers = {"LoRALinear": made(fastpeft.LoRALinear), "SparseLoRALinear": sparse,
              "AttentionGuidedLoRALinear": made(fastpeft.AttentionGuidedLoRALinear)}  # fmt: skip
    return {name: _step(layer, x) for name, layer in layers.items()}


def _layers(tiny: bool) -> dict[str, Step]:
    count, x = 4 if tiny else 224, torch.randn(4, 32)

    def model(make: Callable[[nn.Module], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(make(nn.Linear(32, 32)) for _ in range(count)))

    lora = model(lambda layer: fastpeft.LoRALinear.from_linear(layer, rank=8, dropout=0.0))
    ada = model(lambda layer: fastpeft.AdaLoRALinear.from_linear(layer, rank=8, dropout=0.0, form="svd"))
    allocator = fastpeft.RankAllocator(ada, 4, total_step=10**6)
    steps = {"LoRA": _step(lora, x), "AdaLoRA": _step(ada, x),
             "AdaLoRA, orthogonality loss": _step(ada, x, allocator.orthogonality_loss)}  # fmt: skip
    for step in steps.values():
        step()
    steps["RankAllocator.update"] = lambda: allocator.update(10)
    with contextlib.suppress(ImportError):
        steps["PEFT's allocator"] = _peft_allocator(model(lambda layer: layer), x)
    return steps


def _peft_allocator(base: nn.Module, x: torch.Tensor) -> Step:
    import peft

    config = peft.AdaLoraConfig(
        init_r=8, target_r=4, tinit=0, tfinal=0, deltaT=1, total_step=10**6,
        target_modules=[str(i) for i in range(len(base))],
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    _step(model, x)()
    return lambda: model.base_model.update_and_allocate(10)


class Direct(fastpeft.AdapterFusion):
    """The definition: a key and a value of each adapter's delta."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deltas = torch.stack([adapter.delta(x) for adapter in self.adapters], dim=-2)
        p = (self.query(x).unsqueeze(-2) * self.key(deltas)).sum(-1).softmax(-1)
        return x + (p.unsqueeze(-1) * self.value(deltas)).sum(-2)


def _fusion(tiny: bool) -> dict[str, Step]:
    M, d, m, n = (8, 32, 4, 3) if tiny else (512, 768, 48, 8)
    torch.manual_seed(0)
    adapters = [fastpeft.Adapter(d, m) for _ in range(n)]
    for adapter in adapters:
        nn.init.normal_(adapter.up.weight, std=0.05)
    fusion = fastpeft.AdapterFusion(d, adapters)
    direct = Direct(d, copy.deepcopy(adapters))
    direct.load_state_dict(fusion.state_dict())
    x = torch.randn(M, d, requires_grad=True)
    torch.testing.assert_close(fusion(x), direct(x), rtol=1e-3, atol=1e-4)
    return {"AdapterFusion": _step(fusion, x), "written out": _step(direct, x)}


def cases(device: str, tiny: bool = False) -> list[Case]:
    if device != "cpu":
        return []
    return [
        Case("512 x 1024 x 1024 r=16 fp32", "forward + backward", "LoRALinear", lambda t: _linear(t, torch.float32)),
        Case("512 x 1024 x 1024 r=16 bf16", "forward + backward", "LoRALinear", lambda t: _linear(t, torch.bfloat16)),
        Case("224 layers 4 x 32 x 32 r=8", "a step; an allocation", "LoRA", _layers),
        Case("fusion of 8, d=768, bottleneck 48, M=512", "forward + backward", "AdapterFusion", _fusion),
    ]


def new_results(device: str, tiny: bool = False) -> dict:
    if device == "cpu":
        steady_cpu()
    return {"op": OP, "environment": tree.environment(device), "notes": [], "cases": []}


def case_result(case: Case, race: Race) -> dict:
    return {"case": case.name, "what": case.what, "base": case.base, "peers": race.summary(case.base), "absent": {},
            "counted": "not counted: compositions of counted launches"}  # fmt: skip


def test_case(case, race, results, tiny):
    results["cases"].append(case_result(case, race(case.make(tiny))))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="time budget of one case")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall", help="CPU time, on shared cores")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries the benchmark itself")
    args = parser.parse_args(argv)
    data = new_results("cpu", args.tiny)
    data["clock"] = args.clock
    for case in cases("cpu", args.tiny):
        race = Race(case.make(args.tiny), "process" if args.clock == "process" else "cpu").run(args.seconds)
        data["cases"].append(case_result(case, race))
    path = tree.save_json(f"{OP}_cpu" + ("_tiny" if args.tiny else ""), data)
    plot(data, path.with_suffix(".png"))
    print(result_tables(data))


if __name__ == "__main__":
    main()
