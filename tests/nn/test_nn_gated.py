"""AttentionGuidedLoRALayer and Linear: the gate's definition, its two forms, refusals."""

import pytest
import torch

from fastpeft import AttentionGuidedLoRALayer, AttentionGuidedLoRALinear, explain
from nn_cases import linear
from variant_cases import assert_parity, assert_whole, masked_in_training


def made(layout="in_out", dtype=torch.float32, **options):
    options = {"rank": 4, "dropout": 0.0, "alpha": 8.0, "layout": layout, **options}
    module = AttentionGuidedLoRALinear(linear(dtype=dtype), **options)
    torch.nn.init.normal_(module.lora_B, std=0.4)
    return module


def formula(module):
    def run(p, x):
        a, b = (p["lora_A"].t(), p["lora_B"].t()) if module.layout == "in_out" else (p["lora_A"], p["lora_B"])
        logits = x @ p["attention.weight"].t() + p["attention.bias"]
        gate = logits.softmax(-1) if module.gate == "softmax" else logits.sigmoid()
        y = (gate * module.gate_scale * (x @ a.t())) @ b.t() * module.scaling
        return y + x @ p["weight"].t() + p["bias"]

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("layout", "gate"), [("in_out", "softmax"), ("out_in", "sigmoid")])
def test_parity(layout, gate, dtype):
    module = made(layout, dtype, gate=gate, gate_scale=4.0)
    assert_parity(module, formula(module), torch.randn(7, 32, dtype=torch.float64), dtype)


def test_whole():
    module = made()
    x = torch.randn(2, 5, 32)
    assert_whole(module, x)
    masked_in_training(module, x)
    base = linear()
    torch.testing.assert_close(AttentionGuidedLoRALinear(base, rank=4)(x), base(x))
    assert "gate=softmax" in repr(module) and "attention.weight" in module.state_dict()
    assert "lora_between" in str(explain(module.eval(), x))


def test_document_form():
    layer = AttentionGuidedLoRALayer(768, 512)
    assert layer.lora_A.shape == (768, 4) and layer.scaling == 0.01 and layer.attention.weight.shape == (4, 768)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 768)
    gate = torch.softmax(layer.attention(x), dim=-1)
    torch.testing.assert_close(layer(x), gate * (x @ layer.lora_A) @ layer.lora_B * 0.01, rtol=1e-4, atol=1e-5)


def test_one_read_of_x():
    """The gate's matrix and A are one shrink."""
    module = made()
    seen = []
    from fastpeft.ops import _library

    original = _library.call
    _library.call = lambda op, *args: seen.append(op) or original(op, *args)
    try:
        module(torch.randn(3, 32, requires_grad=True)).sum().backward()
    finally:
        _library.call = original
    assert seen.count("lora_shrink") == 1 and len(seen) == 4


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: made(rank=1), ValueError, "rank must be at least 2 with gate='softmax'"),
        (lambda: made(gate="relu"), ValueError, "gate must be one of softmax, sigmoid, got 'relu'"),
        (lambda: made(gate_scale="4"), TypeError, "gate_scale must be a number"),
        (lambda: made().merge(), ValueError, r"update must be one matrix for merge\(\)"),
        (lambda: made().delta_weight(), ValueError, "update must be one matrix"),
        (lambda: made()(torch.randn(2, 32), 1), TypeError, "take no condition"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert made(rank=1, gate="sigmoid").rank == 1
