"""Which modules a list of targets means, and what is adapted where nothing is said."""

import pytest
import torch
from torch import nn

from fastpeft import EfficientFineTuningManager
from fastpeft.manager import targets
from manager_cases import Small, encoder


def found(model, wanted):
    kinds = (nn.Linear, nn.MultiheadAttention)
    test = lambda module: isinstance(module, kinds)  # noqa: E731
    return list(targets.find("op", targets.walk(model), wanted, test, "nn.Linear"))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("layers.1.linear2", ["layers.1.linear2"]),
        ("linear2", ["layers.0.linear2", "layers.1.linear2"]),
        ("self_attn.out_proj", ["layers.0.self_attn.out_proj", "layers.1.self_attn.out_proj"]),
        (r"layers\.0\.linear\d", ["layers.0.linear1", "layers.0.linear2"]),
        (["linear1", "layers.0.linear1"], ["layers.0.linear1", "layers.1.linear1"]),
        # An attention is adapted as a whole, so its out_proj is not listed beside it.
        ("layers.1", ["layers.1.self_attn", "layers.1.linear1", "layers.1.linear2"]),
        ((name for name in ["linear1"]), ["layers.0.linear1", "layers.1.linear1"]),
    ],
    ids=["exact", "suffix", "dotted", "regex", "twice", "container", "generator"],
)
def test_find(wanted, expected):
    assert found(encoder(), wanted) == expected


def test_a_suffix_ends_at_a_dot():
    model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "proj": nn.Linear(2, 2)})
    assert found(model, "proj") == ["proj"]
    with pytest.raises(ValueError, match=r"close: .*q_proj"):
        found(model, "_proj")


@pytest.mark.parametrize(
    ("wanted", "error", "text"),
    [
        (
            ["linear2", "linaer1"],
            ValueError,
            r"must match modules of the model, got 'linaer1': nothing matches; close: linear1",
        ),
        ("xyz", ValueError, "'xyz': nothing matches; the model has layers"),
        (["dropout"], ValueError, "must match nn.Linear, or what holds such, got 'dropout': Dropout"),
        ([], ValueError, "must name at least one module"),
        (3, TypeError, "must be a name, a regular expression, or a list of such, got 3"),
        (["linear1", 3], TypeError, "must be a name"),
        ("linear[", ValueError, "nothing matches"),
    ],
)
def test_errors(wanted, error, text):
    with pytest.raises(error, match=text):
        found(encoder(), wanted)


def test_a_module_under_two_names_is_adapted_once_and_under_both():
    model = Small()
    model.again = model.body["a"]
    manager = EfficientFineTuningManager(model).apply_lora("again", rank=2)
    assert model.again is model.body["a"] and len(manager.entries) == 1
    manager.unload()
    assert model.again is model.body["a"] and type(model.again) is nn.Linear


def test_names_are_the_models_own_whatever_is_adapted_already():
    model = encoder()
    manager = EfficientFineTuningManager(model).apply_adapter("self_attn").apply_lora("self_attn.out_proj", rank=2)
    manager.apply_adalora("layers.0.self_attn.out_proj", rank=2)
    assert list(targets.walk(model)) == list(targets.walk(encoder()))
    assert [entry.path for entry in manager.entries][-1] == "layers.0.self_attn.out_proj"


def test_defaults():
    def paths(model, method, **options):
        return [entry.path for entry in getattr(EfficientFineTuningManager(model), method)(**options).entries]

    assert paths(Small(), "apply_lora") == ["body.a", "body.b"]  # the head is a last child of the model
    assert paths(nn.Sequential(nn.Linear(4, 4)), "apply_lora") == ["0"]
    assert paths(encoder(), "apply_adalora")[:2] == ["layers.0.self_attn.out_proj", "layers.0.linear1"]
    first = paths(encoder(), "apply_lora")[:4]  # an attention's inputs too
    assert first == [f"layers.0.{name}" for name in ("self_attn", "self_attn.out_proj", "linear1", "linear2")]
    assert paths(encoder(), "apply_adapter", kind="pfeiffer") == ["layers.0.linear2", "layers.1.linear2"]
    assert paths(encoder(), "apply_adapter")[:2] == ["layers.0.self_attn", "layers.0.linear2"]
    with pytest.raises(ValueError, match="target_modules must be given"):
        paths(nn.Sequential(nn.ReLU()), "apply_lora")
    with pytest.raises(ValueError, match="target_modules must be given"):
        paths(Small(), "apply_adapter")


def test_the_model_itself_is_no_target():
    with pytest.raises(ValueError, match="model must hold the layers to adapt"):
        EfficientFineTuningManager(nn.Linear(4, 4)).apply_lora("")


def test_an_attention_with_a_forward_of_its_own_is_passed_over():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    model = nn.ModuleDict({"attention": Own(8, 2), "linear": nn.Linear(8, 8)})
    manager = EfficientFineTuningManager(nn.ModuleDict({"body": model})).apply_lora("body", rank=2)
    assert [entry.path for entry in manager.entries] == ["body.linear"]
    with pytest.raises(ValueError, match=r"got 'out_proj': NonDynamicallyQuantizableLinear"):
        manager.apply_lora("out_proj")


def test_a_shared_child_does_not_loop():
    model = Small()
    model.body["a"].lora_layer = model.body["a"]  # the documents' snippet on sharing makes such a circle
    assert "body.b" in targets.walk(model)
    assert torch.equal(targets.walk(model)["head"].weight, model.head.weight)
