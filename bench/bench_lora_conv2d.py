"""LoRA convolution, forward + backward, beside the frozen one, the unfold formula and PEFT, in one run on a CPU.

    python bench/bench_lora_conv2d.py [--seconds 20] [--clock process] [--tiny]

The ratio is to the frozen convolution's forward + dX, one thread. Memory is what a call takes beyond the frozen one's.
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn

from common import tree
from common.timing import Race, peak_cpu_bytes, steady_cpu
from fastpeft import LoRAConv2d

OP = "lora_conv2d"
RANK, ALPHA = 16, 32.0


def unfolded(base: nn.Conv2d) -> nn.Module:
    """The formula of the unfolded windows, as an eager module."""
    layer = LoRAConv2d.from_conv(base, rank=RANK, alpha=ALPHA, dropout=0.0)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = torch.conv2d(x, layer.weight, layer.bias, base.stride, base.padding)
        windows = nn.functional.unfold(x, base.kernel_size, padding=base.padding, stride=base.stride)
        s = layer.lora_A.to(x.dtype) @ windows
        return y + layer.scaling * (layer.lora_B.to(x.dtype) @ s).view_as(y)

    layer.forward = forward
    return layer


def peft_layer(base: nn.Conv2d, p: float) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=p, target_modules=["0"])
    return peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]


def build(dtype: torch.dtype, last: bool, shape: tuple[int, ...], C: int) -> dict[str, Callable[[], None]]:
    """Steps by name: forward and backward to x and the adapter."""
    to = torch.channels_last if last else torch.contiguous_format
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=gen).to(dtype, memory_format=to).requires_grad_()

    def base() -> nn.Conv2d:
        torch.manual_seed(0)
        return nn.Conv2d(shape[1], C, 3, padding=1).to(dtype=dtype, memory_format=to).requires_grad_(False)

    layers = {"frozen": base(), "unfold formula": unfolded(base())}
    for p in (0.0, 0.1):
        layers[f"ours p={p}"] = LoRAConv2d.from_conv(base(), rank=RANK, alpha=ALPHA, dropout=p)
        try:
            layers[f"PEFT p={p}"] = peft_layer(base(), p)
        except ImportError:
            print("PEFT is not installed: left out")
    if dtype == torch.float32:
        layers["ours, accumulated"] = LoRAConv2d.from_conv(
            base(), rank=RANK, alpha=ALPHA, dropout=0.0, path="accumulate"
        )
    dy = torch.randn_like(layers["frozen"](x).detach())

    def step(layer: nn.Module) -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(dy)

    return {name: (lambda layer=layer: step(layer)) for name, layer in layers.items()}


def run(tiny: bool = False, budget_s: float = 20.0, clock: str = "wall") -> dict:
    steady_cpu()
    shape, C = ((1, 16, 8, 8), 16) if tiny else ((8, 256, 64, 64), 256)
    data: dict = {
        "op": OP,
        "environment": tree.environment("cpu"),
        "rank": RANK,
        "x": shape,
        "out": C,
        "clock": clock,
        "cases": [],
    }
    for dtype in (torch.float32, torch.bfloat16):
        for last in (True, False):
            steps = build(dtype, last, shape, C)
            rows = Race(steps, "process" if clock == "process" else "cpu").run(budget_s).summary("frozen")
            peaks = {name: peak_cpu_bytes(step) for name, step in steps.items()}
            for name, row in rows.items():
                row["extra_bytes"] = max(0, peaks[name] - peaks["frozen"])
            case = f"{str(dtype)[6:]}, {'channels-last' if last else 'contiguous'}"
            data["cases"].append({"case": case, "peers": rows})
            print(f"\n{case}\n{'':<20}{'ms':>9}{'ratio':>8}{'extra MB':>10}")
            for name, row in rows.items():
                print(
                    f"{name:<20}{row['median_s'] * 1e3:>9.1f}{row['ratio']:>8.3f}{row['extra_bytes'] / 1e6:>10.1f}",
                    flush=True,
                )
    tree.save_json(f"{OP}_cpu" + ("_tiny" if tiny else ""), data)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="time budget of one case")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries the benchmark itself")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    args = parser.parse_args()
    run(args.tiny, args.seconds, args.clock)


if __name__ == "__main__":
    main()
