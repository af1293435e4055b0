"""Whatever a fused call would skip is computed, or left to PEFT with a reason: also what comes after `accelerate`."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._debug_mode import DebugMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft", reason="peft is not installed")

from peft.tuners.lora.layer import Linear as PeftLinear
from transformers.pytorch_utils import Conv1D

from fastpeft.integrations import accelerate, reason, restore, status
from peft_cases import batch, compare, lora_layers, toy

pytestmark = pytest.mark.filterwarnings("ignore:fastpeft:UserWarning")


def doubled(function):
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


class DoublingFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return 2 * y if func is nn.functional.linear else y


class DoublingOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return 2 * y if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default) else y


# What is replaced -> the reason that is given.
REPLACED = {
    "Linear.forward": ((nn.Linear, "forward"), "torch.nn.Linear.forward has been replaced"),
    "Linear.__call__": ((nn.Linear, "__call__"), "torch.nn.Linear.__call__ has been replaced"),
    "F.linear": ((nn.functional, "linear"), "torch.nn.functional.linear has been replaced"),
    "Dropout.forward": ((nn.Dropout, "forward"), "torch.nn.Dropout.forward has been replaced"),
    "F.dropout": ((nn.functional, "dropout"), "torch.nn.functional.dropout has been replaced"),
    "Conv1D.forward": ((Conv1D, "forward"), "Conv1D.forward has been replaced"),
    "PEFT's forward": ((PeftLinear, "forward"), "lora.Linear.forward has been replaced"),
}


def left_to_peft(ours, plain, expected, x):
    """The call is PEFT's own to the bit, and report, reason and status say why."""
    torch.manual_seed(3)
    found = ours(x.clone())
    torch.manual_seed(3)
    assert torch.equal(found, plain(x.clone()))
    assert expected in reason(lora_layers(ours)[0])
    assert any(expected in why for why in status(ours).left)
    assert any(expected in why for why in accelerate(ours).skipped.values())


@pytest.mark.parametrize("name", REPLACED)
def test_replaced_after_accelerate(name, monkeypatch):
    (holder, attribute), expected = REPLACED[name]
    plain = toy(lora_dropout=0.4)
    if holder is Conv1D:
        plain = lora_layers(plain)[1]
    ours = copy.deepcopy(plain)
    assert not accelerate(ours).skipped
    monkeypatch.setattr(holder, attribute, doubled(getattr(holder, attribute)))
    left_to_peft(ours, plain, expected, batch(shape=(3, 24 if holder is Conv1D else 20))["x"])
    monkeypatch.undo()
    assert reason(lora_layers(ours)[0]) is None


@pytest.mark.parametrize("mode", [DoublingFunctions, DoublingOperators])
def test_modes(mode):
    plain = toy()
    ours = copy.deepcopy(plain)
    accelerate(ours)
    with mode():
        left_to_peft(ours, plain, f"inside {mode.__name__}, a mode that may change", batch()["x"])
    assert reason(lora_layers(ours)[0]) is None


def test_modes_that_change_nothing():
    ours = toy()
    accelerate(ours)
    with torch.device("cpu"), DebugMode():  # torch's own see every registered operator
        ours(batch()["x"])
    assert status(ours).served == 3 and not status(ours).left


def bias_on_A(layer):
    layer.lora_A["default"].bias = nn.Parameter(torch.randn(4))


def loose_bias_on_A(layer):
    del layer.lora_A["default"].bias
    layer.lora_A["default"].bias = torch.randn(4)


def dropout_in_place(layer):
    layer.lora_dropout["default"] = nn.Dropout(0.4, inplace=True)


def sparse_base(layer):
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().to_sparse_csr(), requires_grad=False)


def subclassed_bias(layer):
    class Own(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    layer.base_layer._parameters["bias"] = layer.base_layer.bias.detach().as_subclass(Own)


CHANGED = {
    "bias on A": (bias_on_A, "lora_A has a bias"),
    "loose bias on A": (loose_bias_on_A, "lora_A has a bias"),
    "dropout in place": (dropout_in_place, "lora_dropout changes its input in place"),
    "sparse base": (sparse_base, "the weight of base_layer is sparse (torch.sparse_csr)"),
    "bias of a subclass": (subclassed_bias, "the bias of base_layer is a Own"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("name", CHANGED)
def test_changed_after_accelerate(name):
    change, expected = CHANGED[name]
    ours = lora_layers(toy())[0]
    plain = copy.deepcopy(ours)
    assert accelerate(ours).accelerated
    for layer in (ours, plain):
        torch.manual_seed(1)
        change(layer)
    left_to_peft(ours, plain, expected, batch(shape=(3, 20))["x"])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_input():
    ours = lora_layers(toy())[0]
    plain = copy.deepcopy(ours)
    accelerate(ours)
    x = batch(shape=(3, 20))["x"].to_sparse_csr()
    assert reason(ours, x) == "the input is not a plain dense tensor"
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0)


def test_loose_bias_is_computed():
    def loose(model):
        for layer in lora_layers(model)[:2]:
            bias = layer.base_layer.bias.detach() + 1
            del layer.base_layer.bias
            layer.base_layer.bias = bias

    compare(toy(), batch(), state=loose, fast=3)


def test_forward_kept_before_restore():
    layer = lora_layers(toy())[0]
    x = batch()["x"]
    wanted = layer(x)
    accelerate(layer)
    kept = layer.forward
    torch.testing.assert_close(kept(x), wanted)
    layer.forward = kept
    assert restore(layer) == 1
    assert torch.equal(kept(x), wanted) and torch.equal(layer(x), wanted)
    assert layer.forward.__func__ is PeftLinear.forward


def test_wrapped_forward_is_reported_as_served():
    model = toy()
    accelerate(model)
    for layer in lora_layers(model):
        layer.forward = functools.wraps(layer.forward)(functools.partial(layer.forward))
    report = accelerate(model)
    model(batch()["x"])
    assert len(report.accelerated) == 3 and status(model).served == 3
    x = batch()["x"]
    assert restore(model) == 3
    model(x)  # the wrapper still calls what was ours
    for layer in lora_layers(model):
        layer.forward = lambda x: x
    assert set(accelerate(model).skipped.values()) == {"forward has been replaced on the layer itself"}


# Which samples use which adapter -> calls of the operator
NAMED = {
    "one": (["second"] * 3, 3),
    "none": (["__base__"] * 3, 0),
    "absent": (None, 3),
}


@pytest.mark.parametrize("name", NAMED)
def test_adapter_names(name):
    names, fast = NAMED[name]
    model = toy(adapters=2, lora_bias=True).eval()
    found = compare(model, batch(), call=lambda m, x: m(x, adapter_names=names), fast=fast)
    if name == "one":
        model.set_adapter("second")
        torch.testing.assert_close(found["output"], model(batch()["x"]))


def test_dropout_of_several_adapters_is_independent():
    """Each draws a mask of its own: hidden together with the probability of chance."""
    layer = lora_layers(toy(adapters=2, lora_dropout=0.5, r=20))[0]
    layer.set_adapter(["default", "second"])
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        for i, name in enumerate(("default", "second")):
            for part, shape in ((layer.lora_A, (20, 20)), (layer.lora_B, (24, 20))):
                part[name].weight = nn.Parameter(torch.eye(*shape) * (1 if part is layer.lora_A else 10**i))
            layer.scaling[name] = 0.5
    accelerate(layer)
    y = layer(torch.ones(500, 20))[:, :20]
    assert status(layer).served == 1
    shares = [(y == value).float().mean().item() for value in (0.0, 1.0, 10.0, 11.0)]
    assert all(abs(share - 0.25) < 0.03 for share in shares), shares
