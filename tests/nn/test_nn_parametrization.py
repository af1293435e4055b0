"""LoRAParametrization: the bits of W + (B A) · scale, on every kind of module, its switches and S2's freeze loop."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastpeft import LoRALayer, LoRAParametrization, add_parametrization, disable_lora, enable_lora, lora_disabled

MODULES = {
    "linear": (lambda: nn.Linear(6, 5), "weight", lambda: (torch.randn(3, 6),)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), "weight", lambda: (torch.randn(2, 4, 5, 5),)),
    "embedding": (lambda: nn.Embedding(7, 5), "weight", lambda: (torch.tensor([1, 3]),)),
    "in_proj": (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight", lambda: (torch.randn(3, 2, 8),) * 3),
    "lstm": (lambda: nn.LSTM(6, 5), "weight_hh_l0", lambda: (torch.randn(4, 2, 6),)),
    "gru": (lambda: nn.GRU(6, 5, bidirectional=True), "weight_ih_l0_reverse", lambda: (torch.randn(4, 2, 6),)),
}


def first(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", MODULES)
def test_every_kind_of_module(kind, mode):
    make, name, inputs = MODULES[kind]
    module, x = getattr(make(), mode)(), inputs()
    before, weight = first(module(*x)), getattr(module, name).detach().clone()
    update = add_parametrization(module, rank=2, alpha=4, name=name)
    torch.testing.assert_close(first(module(*x)), before, rtol=0, atol=0)
    with torch.no_grad():
        update.lora_B.normal_()
    assert torch.equal(getattr(module, name), weight + (update.lora_B @ update.lora_A).view(weight.shape) * 2.0)
    original = f"parametrizations.{name}.original"
    state = {key.replace(original, name): value for key, value in module.state_dict().items() if ".0.lora_" not in key}
    peer = make()
    peer.load_state_dict(state)
    with torch.no_grad():
        getattr(peer, name).copy_(getattr(module, name))
    y = first(module(*x))
    torch.testing.assert_close(y, first(getattr(peer, mode)()(*x)))
    assert not torch.allclose(y, before)
    y.square().sum().backward()
    assert update.lora_A.grad.any() and update.lora_B.grad.any() and module.parametrizations[name].original.grad is None
    with lora_disabled(module):
        torch.testing.assert_close(first(module(*x)), before, rtol=0, atol=0)
    torch.testing.assert_close(first(copy.deepcopy(module)(*x)), y)


def test_switches_and_freeze_loop():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), LoRALayer(4, 4))
    for index in (0, 2):
        add_parametrization(model[index], rank=1, alpha=1, freeze_base=False)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.requires_grad = False
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.parametrizations.weight.0.lora_{x}" for i in "02" for x in "AB"} | {"3.lora_A", "3.lora_B"}
    assert disable_lora(model) == 3
    assert not model[0].parametrizations.weight[0].enabled and "disabled" in repr(model)
    assert enable_lora(model) == 3 and model[3].enabled
    x = torch.randn(2, 6)
    with parametrize.cached():
        model(x)
    parametrize.remove_parametrizations(model[0], "weight")
    model(x)


def test_as_the_document_calls_it():
    layer = nn.Linear(784, 1000)
    features_in, features_out = layer.weight.shape
    update = LoRAParametrization(features_in, features_out, rank=1, alpha=1, device="cpu")
    assert update.lora_A.shape == (1, 784) and update.lora_B.shape == (1000, 1) and update.scale == 1
    parametrize.register_parametrization(layer, "weight", update)
    original = layer.parametrizations.weight.original
    assert torch.equal(layer.weight, original + (update.lora_B @ update.lora_A) * update.scale)


def test_dtypes_and_compile():
    layer = nn.Linear(6, 5, dtype=torch.bfloat16)
    update = add_parametrization(layer, rank=2)
    assert update.lora_A.dtype == torch.bfloat16 == layer.weight.dtype
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert add_parametrization(nn.Linear(6, 5, device="meta")).lora_A.is_meta


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: add_parametrization("fc"), TypeError, r"layer must be an nn\.Module, got str"),
        (lambda: add_parametrization(nn.Linear(2, 2), name="kernel"), ValueError, r"name must be a parameter of Linear \(weight, bias\), got 'kernel'"),
        (lambda: add_parametrization(nn.Linear(2, 2), name="bias"), ValueError, r"bias must have two dimensions or more, got \[2\]"),
        (lambda: add_parametrization(nn.Linear(2, 2), rank=0), ValueError, "rank must be at least 1, got 0"),
        (lambda: add_parametrization(nn.Linear(2, 2), alpha="1"), TypeError, "alpha must be a number"),
        (lambda: add_parametrization(nn.LazyLinear(2)), ValueError, "weight must be initialised"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
