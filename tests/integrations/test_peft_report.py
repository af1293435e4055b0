"""What `accelerate` says, and what `restore` leaves: nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="peft is not installed")

from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear

from fastpeft.integrations import Report, accelerate, restore
from fastpeft.integrations.peft import inplace, linear, reason
from fastpeft.integrations.peft.kinds import KINDS
from peft_cases import TARGETS, Toy, lora_layers, toy


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 8)
        self.conv = nn.Conv2d(1, 2, 3)
        self.lin = nn.Linear(8, 8)


def names(model):
    return [name for name, module in model.named_modules() if isinstance(module, PeftLinear)]


def test_report():
    model = get_peft_model(Mixed(), LoraConfig(target_modules=["emb", "conv", "lin"]))
    report = accelerate(model)
    assert isinstance(report, Report)
    assert report.accelerated == ["base_model.model.lin"] and report.changed == 1 and not report.waiting
    assert report.skipped == {
        "base_model.model.emb": "lora.Embedding is not PEFT's lora.Linear",
        "base_model.model.conv": "lora.Conv2d is not PEFT's lora.Linear",
    }
    text = str(report)
    assert text.startswith("fastpeft: 1 of 3 PEFT layers accelerated")
    assert "left to PEFT: lora.Embedding is not PEFT's lora.Linear" in text and "base_model.model.emb" in text


def test_idempotent():
    model = toy()
    first, second = accelerate(model), accelerate(model)
    assert (first.changed, second.changed) == (3, 0)
    assert first.accelerated == second.accelerated == names(model)
    kinds = {type(layer) for layer in lora_layers(model)}
    accelerate(toy())
    assert kinds == {inplace.built(linear.AcceleratedLinear, PeftLinear)}, "one class per source class"
    assert (restore(model), restore(model)) == (3, 0)


def test_single_layer():
    layer = lora_layers(toy())[0]
    report = accelerate(layer)
    assert report.accelerated == [""] and reason(layer) is None
    assert restore(layer) == 1 and type(layer) is PeftLinear


def test_nothing_found():
    for model in (nn.Linear(2, 2), Toy()):
        report = accelerate(model)
        assert not report.accelerated and not report.skipped
        assert str(report) == "fastpeft: nothing to accelerate: no PEFT layers"


def test_without_peft():
    code = (
        "import sys, torch, fastpeft.integrations as f; r = f.accelerate(torch.nn.Linear(2, 2)); print(r);"
        "assert 'peft' not in sys.modules and 'transformers' not in sys.modules;"
        "assert f.restore(torch.nn.Linear(2, 2)) == 0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fastpeft: nothing to accelerate: no PEFT layers (peft is not imported)"


def test_new_layers_need_another_call():
    model = get_peft_model(Toy(), LoraConfig(target_modules=["lin0"]))
    accelerate(model)
    model.add_adapter("late", LoraConfig(target_modules=["lin0", "conv"]))
    assert [isinstance(layer, inplace.InPlace) for layer in lora_layers(model)] == [True, False]
    report = accelerate(model)
    assert report.changed == 1 and len(report.accelerated) == 1
    # "late" is not active yet, and the other layer has nothing else.
    assert report.skipped == {"base_model.model.conv": "no active adapter"}
    assert report.waiting == ["base_model.model.conv"]
    assert "left to PEFT, for now" in str(report)
    model.set_adapter("late")
    assert not accelerate(model).skipped


def test_looks_like_peft():
    model = toy()
    layer = lora_layers(model)[0]
    before = (repr(model), type(layer).__module__, type(layer).__qualname__, type(layer).__name__, type(layer).__doc__)
    accelerate(model)
    kind = type(layer)
    assert before == (repr(model), kind.__module__, kind.__qualname__, kind.__name__, kind.__doc__)
    assert isinstance(layer, PeftLinear) and kind is not PeftLinear


def state(model):
    return {
        name: (type(module), dict(vars(module)), {key: list(value) for key, value in vars(module).items()
                                                  if isinstance(value, dict)})
        for name, module in model.named_modules()
    }  # fmt: skip


def test_restore_leaves_no_trace():
    model = toy(adapters=2, lora_dropout=0.2, modules_to_save=["head"])
    x = torch.randn(3, 20)
    peft_before = {key: id(value) for key, value in vars(PeftLinear).items()}
    model(x).sum().backward()
    before, keys = state(model), list(model.state_dict())
    accelerate(model)
    assert list(model.state_dict()) == keys
    during = state(model)
    assert {name: entry[1:] for name, entry in during.items()} == {name: entry[1:] for name, entry in before.items()}
    model(x).sum().backward()
    restore(model)
    assert state(model) == before
    assert {key: id(value) for key, value in vars(PeftLinear).items()} == peft_before


def test_half_patched_is_put_back(monkeypatch):
    model = toy()
    original = inplace.built
    made = []

    def failing(mixin, own):
        made.append(own)
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(mixin, own)

    monkeypatch.setattr(inplace, "built", failing)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model)
    assert len(made) == 3 and {type(layer) for layer in lora_layers(model)} == {PeftLinear}


@pytest.mark.parametrize("op", [accelerate, restore])
def test_bad_input(op):
    with pytest.raises(TypeError, match=rf"^{op.__name__}: model must be a torch.nn.Module, got dict$"):
        op({})


def drop(p, **kwargs):
    return lambda layer: layer.lora_dropout.update({"default": nn.Dropout(p, **kwargs)})


class OtherLinear(nn.Linear):
    pass


def other_adapter(layer):
    layer.lora_A["default"].__class__ = OtherLinear


def sharded_by_deepspeed(layer):
    layer.base_layer.weight.ds_id = 3


# What is done to a layer -> the reason given, and what PEFT itself then does is the other tests' matter.
REASONS = {
    "disabled": (lambda layer: layer.enable_adapters(False), "adapters are disabled"),
    "merged": (lambda layer: layer.merge(), "adapters are merged into the base weight"),
    "none active": (lambda layer: layer.set_adapter([]), "no active adapter"),
    "hooked": (lambda layer: layer.lora_B["default"].register_forward_pre_hook(print), "lora_B has hooks"),
    "dropout hooked": (
        lambda layer: layer.lora_dropout["default"].register_forward_hook(print),
        "lora_dropout has hooks",
    ),
    "part replaced": (
        lambda layer: vars(layer.base_layer).update(forward=print),
        "forward of base_layer has been replaced",
    ),
    "layer replaced": (
        lambda layer: vars(layer).update(forward=print),
        "forward has been replaced on the layer itself",
    ),
    "drops all": (drop(1.0), "lora_dropout drops everything"),
    "other dropout": (
        lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout()}),
        "lora_dropout is a AlphaDropout",
    ),
    "other adapter": (other_adapter, "lora_A is a OtherLinear, not torch.nn.Linear"),
    "deepspeed": (sharded_by_deepspeed, "the weight of base_layer is partitioned by DeepSpeed"),
    "meta": (lambda layer: layer.lora_A.to("meta"), "the weight of lora_A is on the meta device"),
    "fp64": (lambda layer: layer.to(torch.float64), "the weight of base_layer is torch.float64"),
    "A and B differ": (lambda layer: layer.lora_A.bfloat16(), "the weights of the adapters have different dtypes"),
    "scale": (lambda layer: layer.scaling.update(default=torch.ones(2)), "scaling is a Tensor that is neither"),
    "trained scale": (
        lambda layer: layer.scaling.update(default=torch.ones((), requires_grad=True)),
        "scaling is a Tensor that is neither",
    ),
    "nested": (
        lambda layer: setattr(layer, "base_layer", lora_layers(toy())[0]),
        "its base layer is itself an adapter layer",
    ),
    "base": (lambda layer: setattr(layer, "base_layer", OtherLinear(20, 24)), "is not torch.nn.Linear or Conv1D"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reason(name):
    change, expected = REASONS[name]
    layer = lora_layers(toy())[0]
    assert reason(layer) is None
    accelerate(layer)
    change(layer)
    assert expected in reason(layer)
    report = accelerate(layer)
    assert "" not in report.accelerated and expected in report.skipped[""]


def test_reason_of_a_call():
    layer = lora_layers(toy())[0]
    x = torch.randn(3, 20)
    assert reason(layer, x) is None
    assert reason(layer, x, kwargs={"adapter_names": ["default"] * 3}) is None
    assert reason(layer, x, kwargs={"adapter_names": ["__base__"] * 3}) == "no active adapter"
    for mixed in (["default", "default", "__base__"], ["default"] * 2):
        assert reason(layer, x, kwargs={"adapter_names": mixed}) == "mixed batch (adapter_names)"
    assert reason(layer, x, kwargs={"alora_offsets": None}) == "extra arguments (alora_offsets)"
    assert reason(layer, x.double()) == "the input is torch.float64"
    assert reason(layer, x.bfloat16()) == "the input and the base weight have different dtypes"
    assert reason(layer, x.to("meta")) == "the input is on another device than the weights"
    with torch.autocast("cpu", torch.bfloat16):
        assert reason(layer, x.bfloat16()) is None
    layer.cast_input_dtype_enabled = False
    with torch.autocast("cpu", torch.bfloat16):
        assert "casting the input is disabled" in reason(layer, x.bfloat16())


def test_classes_left_alone():
    class Own(PeftLinear):
        def forward(self, x):
            return super().forward(x) + 1.0

    layer = lora_layers(toy())[0]
    layer.__class__ = Own
    assert "has a forward of its own" in accelerate(layer).skipped[""] and type(layer) is Own
    ia3 = get_peft_model(Toy(), IA3Config(target_modules=TARGETS, feedforward_modules=[]))
    assert set(accelerate(ia3).skipped.values()) == {"ia3.Linear is not PEFT's lora.Linear"}


def test_inherited_class_is_accelerated():
    class Inherited(PeftLinear):
        extra = 1

    layer = lora_layers(toy())[0]
    layer.__class__ = Inherited
    assert accelerate(layer).changed == 1 and layer.extra == 1
    assert restore(layer) == 1 and type(layer) is Inherited


@pytest.mark.parametrize("version", ["0.19.1", "0.23.0", "unknown"])
def test_untested_peft_is_left_alone(monkeypatch, version):
    monkeypatch.setattr(peft, "__version__", version)
    report = accelerate(toy())
    assert not report.accelerated
    assert set(report.skipped.values()) == {f"peft {version} is outside the tested range >=0.20,<0.23"}


def test_replaced_peft_forward_is_left_alone(monkeypatch):
    monkeypatch.setattr(PeftLinear, "forward", lambda self, x: x)
    assert "lora.Linear.forward has been replaced" in accelerate(toy()).skipped["base_model.model.lin0"]
    assert KINDS[0].peft_class() is PeftLinear
