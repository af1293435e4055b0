"""``device_map``: the hooks of Hugging Face's accelerate around the modules of an accelerated PEFT model."""

from __future__ import annotations

import copy

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed")
hf = pytest.importorskip("accelerate", reason="Hugging Face's accelerate is not installed")

from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module

from fastpeft.integrations import accelerate, reason, restore
from peft_cases import batch, compare, lora_layers, run, toy


def spread(model, device="cpu"):
    """As ``from_pretrained(..., device_map=...)`` leaves it: a hook on every module that has parameters."""
    hf.dispatch_model(model, {"": device}, force_hooks=True)
    layer = lora_layers(model)[0]
    parts = (layer, layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
    assert all("forward" in vars(part) and type(part._hf_hook) is AlignDevicesHook for part in parts)
    return model


def taken_out(model):
    """What accelerate leaves when its hooks go: the class's own forward, bound, in every module's dictionary."""
    remove_hook_from_module(spread(model), recurse=True)
    assert "forward" in vars(lora_layers(model)[0].base_layer)
    return model


@pytest.mark.parametrize("state", [spread, taken_out])
@pytest.mark.parametrize("config", [{}, {"lora_bias": True, "lora_dropout": 0.3}, {"adapters": 2}])
def test_nothing_to_move(state, config):
    def activate(model):
        if "adapters" in config:
            model.base_model.set_adapter(["default", "second"])

    # Hooks after accelerate; then before it.
    compare(toy(**config), batch(), state=lambda model: (activate(model), state(model)), fast=3)
    model = state(toy(**config))
    activate(model)
    compare(model, batch(), fast=3)


def test_restored():
    model = spread(toy())
    wanted = model(**batch())
    for hooks_stay in (True, False):
        assert len(accelerate(model).accelerated) == 3
        if not hooks_stay:
            remove_hook_from_module(model, recurse=True)
        twin = copy.deepcopy(model)
        assert reason(lora_layers(twin)[0]) is None
        assert restore(model) == 3 and not restore(model)
        torch.testing.assert_close(model(**batch()), wanted, rtol=0, atol=0)
        torch.testing.assert_close(twin(**batch()), wanted)
        for layer in lora_layers(model):
            kept = vars(layer)["_old_forward" if hooks_stay else "forward"]
            assert kept.__func__ is peft.tuners.lora.layer.Linear.forward


def test_a_hook_that_does_something():
    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    def doubled(role):
        def state(model):
            for layer in lora_layers(model):
                part = layer.base_layer if role == "base_layer" else getattr(layer, role)["default"]
                add_hook_to_module(part, Doubling(), append=True)
                assert reason(layer).startswith(f"{role} is behind a hook of accelerate, SequentialHook, which may")

        return state

    for role in ("base_layer", "lora_A", "lora_B"):
        compare(spread(toy()), batch(), state=doubled(role), fast=0)

    def whole(model):
        for layer in lora_layers(model):
            add_hook_to_module(layer, Doubling())

    # Around the whole layer a hook sees ours as it would see PEFT's.
    compare(toy(), batch(), state=whole, fast=3)


def test_offloaded():
    model = toy()
    wanted = run(copy.deepcopy(model), batch(), None, 3)["output"]
    accelerate(model)
    hf.cpu_offload(model, execution_device=torch.device("cpu"))
    assert reason(lora_layers(model)[0]).startswith("base_layer is behind a hook of accelerate, AlignDevicesHook,")
    torch.testing.assert_close(model(**batch()), wanted, rtol=0, atol=0)
