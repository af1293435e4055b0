"""Weights and backends that the tests of 4-bit weights share."""

import pytest
import torch

from cases import normal, unless_served
from fastpeft import ops

LEAVES = ("x", "lora_A", "lora_B", "bias", "lora_bias")
QUANT_TYPES = ["nf4", "fp4"]

# shape, block_size, why
SHAPES = [
    ((16, 64), 64, "round"),
    ((1,), 64, "one"),
    ((7,), 32, "rest"),
    ((33, 65), 64, "straddle"),
    ((5, 13), 32, "odd"),
    ((2, 3, 50), 128, "cube"),
    ((96, 200), 64, "nested"),  # 300 blocks: two of the nested kind
    ((3, 5000), 4096, "large"),
]


def shapes(*extra):
    return [pytest.param(shape, size, id=why) for shape, size, why in [*SHAPES, *extra]]


def weight(shape, dtype=torch.float32):
    """Normal values, with what bends a quantiser: a block of zeros where there is room, and an outlier."""
    w = normal(*shape, dtype=dtype)
    flat = w.view(-1)
    if flat.numel() > 600:
        flat[128:256] = 0.0
        flat[300] = 40.0
    return w


def bitsandbytes():
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


def serving(op, device="cpu"):
    """A parameter for each backend but the reference, skipped with its reason where it cannot serve."""
    marks = {backend: unless_served(op, backend, torch.float32, device) for backend in ("cpp", "triton")}
    return [pytest.param(backend, marks=marks[backend]) for backend in marks]


def values(case, dtype, adapter=torch.float32, biases=True):
    """Everything of a call but the weight; lora_A and lora_B are absent where the rank is 0."""
    K, N, R = case.K, case.N, case.R
    given = {"x": normal(case.M, K, dtype=dtype), "dy": normal(case.M, N, dtype=dtype)}
    if R:
        given |= {"lora_A": normal(R, K, dtype=adapter, std=K**-0.5), "lora_B": normal(N, R, dtype=adapter)}
    if biases:
        given |= {"bias": normal(N, dtype=dtype)} | ({"lora_bias": normal(N, dtype=adapter)} if R else {})
    return given


def quantized(N, K, quant_type="nf4", block_size=64, double_quant=True):
    return ops.quantize_4bit(normal(N, K, std=K**-0.5), quant_type, block_size, double_quant, backend="eager")


def apply(leaves, q, backend, **options):
    if "lora_A" in leaves:
        order = [leaves.get(name) for name in LEAVES[1:]]
        return ops.linear4bit_lora(leaves["x"], q, *order, backend=backend, **options)
    return ops.linear4bit(leaves["x"], q, leaves.get("bias"), backend=backend)


def call(given, q, backend, *, scale, p, seed=11):
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items() if name != "dy"}
    for name in ("lora_A", "lora_B"):
        if name in given and not given[name].is_contiguous():  # keep the strides under test
            leaves[name] = given[name].detach().t().clone().t().requires_grad_()
    torch.manual_seed(seed)
    options = {"scale": scale, "dropout": p} if "lora_A" in given else {}
    y = apply(leaves, q, backend, **options)
    y.backward(given["dy"])
    return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}
