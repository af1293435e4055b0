"""A PEFT model over bitsandbytes' weights, and the three-way comparison of `peft_cases` for it."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit
from torch import nn

from fastpeft.integrations import accelerate
from fastpeft.integrations.peft import linear4bit
from peft_cases import RecoveredDropout, budget, doubled, run

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TARGETS = ["lin0", "inner.lin1"]


class Toy(nn.Module):
    is_loaded_in_4bit = True

    def __init__(self, sizes=(64, 128, 32), **quant):
        super().__init__()
        settings = {"compute_dtype": None, "quant_type": "nf4", **quant}
        self.lin0 = bnb.nn.Linear4bit(sizes[0], sizes[1], bias=True, **settings)
        self.inner = nn.ModuleDict({"lin1": bnb.nn.Linear4bit(sizes[1], sizes[2], bias=False, **settings)})
        self.to("cpu")  # quantises

    def forward(self, x):
        return self.inner["lin1"](torch.tanh(self.lin0(x)))


def toy(adapters=1, quant=None, autocast_adapter=True, **config):
    model = None
    for i in range(adapters):
        settings = {
            "r": 4 + 3 * i,
            "lora_alpha": 6 + i,
            "target_modules": TARGETS,
            "init_lora_weights": False,
            **config,
        }
        if model is None:
            model = get_peft_model(
                Toy(**(quant or {})), LoraConfig(**settings), autocast_adapter_dtype=autocast_adapter
            )
        else:
            model.add_adapter("second" if i == 1 else f"second{i}", LoraConfig(**settings))
    return model


def batch(dtype=F32, shape=(3, 5, 64)):
    return {"x": torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)}


def layers(model):
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def recover_dropout(model):
    for layer in layers(model):
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                layer.lora_dropout[name] = RecoveredDropout(dropout.p).train(dropout.training)


def exact(model):
    """The same model in fp64 over what the bytes mean."""
    for layer in layers(model):
        base = layer.base_layer
        weight = bnb.functional.dequantize_4bit(base.weight.data, linear4bit.state_of(base)).double()
        linear = nn.Linear(base.in_features, base.out_features, base.bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if base.bias is not None:
            linear.bias = nn.Parameter(base.bias.data.double(), requires_grad=base.bias.requires_grad)
        layer.base_layer = linear
    return model.double()


def counted(patch):
    """How often the operators are called; a product and a sum in different dtypes count as one."""
    calls = []
    for name in ("linear4bit_lora", "lora_adapter"):
        operator = getattr(linear4bit, name)
        patch.setattr(linear4bit, name, lambda *a, operator=operator, **k: calls.append(operator) or operator(*a, **k))
    alone = linear4bit.base_alone

    def counting(*arguments):
        y = alone(*arguments)
        calls.extend([] if y is None else [alone])
        return y

    patch.setattr(linear4bit, "base_alone", counting)
    return calls


def compare(model, inputs, *, state=None, call=None, context=nullcontext, eps=None, fast=2):
    """As peft_cases.compare, for weights that cannot be made fp64 in place."""
    ours, peer = copy.deepcopy(model), copy.deepcopy(model)
    report = accelerate(ours)
    assert report.changed == len(layers(ours))
    if fast:
        recover_dropout(peer)
    for each in (ours, peer):
        if state is not None:
            state(each)
    gold = exact(copy.deepcopy(peer)) if fast else None
    with pytest.MonkeyPatch.context() as patch, context():
        calls = counted(patch)
        found = run(ours, inputs, call, 3)
    assert len(calls) == fast
    with context():
        expected = run(peer, inputs, call, 3)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for what, value in found.items():
        assert value.dtype == expected[what].dtype and value.shape == expected[what].shape, what
        if not fast:
            assert torch.equal(value, expected[what]), what
    for one, other in zip(ours.parameters(), peer.parameters(), strict=True):
        assert one.dtype == other.dtype
    if fast:
        wanted = run(gold, {key: doubled(value) for key, value in inputs.items()}, call, 3)
        assert wanted.keys() == found.keys()
        budget(found, [expected], wanted, torch.finfo(found["output"].dtype).eps if eps is None else eps)
    return found
