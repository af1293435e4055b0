"""Every state that PEFT can bring a layer into: outputs and every gradient against PEFT's own autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed")

from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.utils import hotswap
from torch.utils.checkpoint import checkpoint

from fastpeft.integrations.peft import linear
from peft_cases import TARGETS, Toy, accelerated, batch, compare, lora_layers, toy


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def merged_then_unmerged(model):
    model.merge_adapter()
    model.unmerge_adapter()


def scaled(model):
    for layer in lora_layers(model):
        layer.set_scale("default", 0.5)
        layer.scale_layer(3.0)
        layer.unscale_layer(2)


def each(method, *args):
    def apply(model):
        for layer in lora_layers(model):
            getattr(layer, method)(*args)

    return apply


# name -> (arguments of toy, how the model gets into the state, calls of our operator in one forward)
STATES = {
    "plain": ({}, None, 3),
    "evaluating": ({"lora_dropout": 0.3}, lambda m: m.eval(), 3),
    "dropout": ({"lora_dropout": 0.3}, None, 3),
    "rslora": ({"use_rslora": True}, None, 3),
    "lora_bias": ({"lora_bias": True}, None, 3),
    "trained biases": ({"bias": "all"}, None, 3),
    "trained base": ({}, lambda m: m.requires_grad_(True), 3),
    "frozen adapter": ({}, lambda m: m.requires_grad_(False), 3),
    "only B trained": ({}, lambda m: [x.lora_A.requires_grad_(False) for x in lora_layers(m)], 3),
    "modules_to_save": ({"modules_to_save": ["head"]}, None, 3),
    "merged": ({}, lambda m: m.merge_adapter(), 0),
    "safely merged": ({}, lambda m: m.merge_adapter(safe_merge=True), 0),
    "merged, unmerged": ({"lora_bias": True, "target_modules": ["lin0", "conv"]}, merged_then_unmerged, 2),
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), 0),
    "merged, disabled": ({}, lambda m: (m.merge_adapter(), m.base_model.disable_adapter_layers()), 0),
    "enabled again": ({}, lambda m: (m.base_model.disable_adapter_layers(), m.base_model.enable_adapter_layers()), 3),
    "scale changed": ({}, scaled, 3),
    "scale an integer": ({}, lambda m: [x.scaling.update(default=2) for x in lora_layers(m)], 3),
    "scale zero": ({}, each("set_scale", "default", 0.0), 3),
    "second adapter": ({"adapters": 2}, lambda m: m.set_adapter("second"), 3),
    "two active": ({"adapters": 2}, lambda m: m.base_model.set_adapter(["default", "second"]), 3),
    "three, biased": (
        {"adapters": 3, "lora_bias": True},
        lambda m: m.base_model.set_adapter(["second2", "default", "second"]),
        3,
    ),
    "two, evaluating": (
        {"adapters": 2, "lora_dropout": 0.3},
        lambda m: (m.base_model.set_adapter(["default", "second"]), m.eval()),
        3,
    ),
    "two with dropout": (
        {"adapters": 2, "lora_dropout": 0.3, "lora_bias": True},
        lambda m: m.base_model.set_adapter(["default", "second"]),
        3,
    ),
    "three, one with dropout": (
        {"adapters": 3, "lora_dropout": 0.3},
        lambda m: (
            m.base_model.set_adapter(["default", "second", "second2"]),
            [
                x.lora_dropout.update({name: torch.nn.Identity()})
                for x in lora_layers(m)
                for name in ("default", "second2")
            ],
        ),
        3,
    ),
    "none active": ({}, lambda m: m.base_model.set_adapter([]), 0),
    "absent active": ({}, lambda m: [setattr(x, "_active_adapter", ["other"]) for x in lora_layers(m)], 0),
    "one of two deleted": (
        {"adapters": 2},
        lambda m: (m.set_adapter("second"), m.delete_adapter("default")),
        3,
    ),
    "weighted adapter": (
        {"adapters": 2},
        lambda m: (
            m.add_weighted_adapter(["default", "second"], [0.7, 0.4], "sum", combination_type="cat"),
            m.set_adapter("sum"),
        ),
        3,
    ),
    "adapter added": ({}, lambda m: m.add_adapter("late", LoraConfig(r=2, target_modules=TARGETS)), 3),
    "dora": ({"use_dora": True}, None, 0),
    "mica": ({"init_lora_weights": "mica"}, None, 0),
    "one layer dora": ({}, lambda m: lora_layers(m)[0].lora_variant.update(default=_Plain()), 2),
}


class _Plain:
    """A variant that happens to do what vanilla LoRA does."""

    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        return result + lora_B(lora_A(x)) * module.scaling[active_adapter]


@pytest.mark.parametrize("name", STATES)
def test_state(name):
    arguments, state, fast = STATES[name]
    found = compare(toy(**arguments), batch(), state=state, fast=fast)
    assert torch.isfinite(found["output"]).all()


@pytest.mark.parametrize("wrong", ["lora_A", "lora_B", "x"])
def test_wrong_gradients_are_noticed(monkeypatch, wrong):
    # PEFT's own suite lets gradients pass that are half as large again.
    operator = linear.lora_linear

    def off_by_a_thousandth(x, w, a, b, *biases, **kwargs):
        tensors = {"x": x, "lora_A": a, "lora_B": b}
        tensors[wrong] = tensors[wrong] + 1e-3 * (tensors[wrong] - tensors[wrong].detach())
        return operator(tensors["x"], w, tensors["lora_A"], tensors["lora_B"], *biases, **kwargs)

    monkeypatch.setattr(linear, "lora_linear", off_by_a_thousandth)
    with pytest.raises(AssertionError, match="error"):
        compare(toy(), batch(), fast=3)


# base dtype, adapter dtype -> PEFT upcasts adapters to fp32 unless told not to
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "base, adapter",
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(base, adapter, p):
    model = toy(base=base, lora_dropout=p)
    for layer in lora_layers(model):
        layer.lora_A.to(adapter)
        layer.lora_B.to(adapter)
    eps = max(torch.finfo(base).eps, torch.finfo(adapter).eps)
    compare(model, batch(base), eps=eps, fast=0 if base == torch.float64 else 3)


@pytest.mark.parametrize("shape", [(20,), (1, 20), (0, 20), (2, 3, 5, 20)])
def test_shapes(shape):
    model = get_peft_model(Toy(), LoraConfig(r=4, target_modules=["lin0", "inner.lin1"], init_lora_weights=False))
    if len(shape) == 1:  # Conv1D itself takes no vector
        model.base_model.model.forward = lambda x: model.base_model.model.lin0(x)
        model = model.base_model.model.lin0
    compare(model, batch(shape=shape), fast=1 if len(shape) == 1 else 2)


def test_non_contiguous_input():
    model = toy()
    compare(model, batch(shape=(20, 5, 3)), call=lambda m, x: m(x.transpose(0, 2).contiguous()[:, ::2]), fast=3)


def test_input_without_gradient():
    model = toy(lora_dropout=0.2)
    compare(model, batch(), call=lambda m, x: m(x.detach()), fast=3)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base, p):
    context = partial(torch.autocast, "cpu", torch.bfloat16)
    compare(toy(base=base, lora_dropout=p), batch(), context=context, eps=torch.finfo(torch.bfloat16).eps, fast=3)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, p):
    # The recomputation must draw the masks of the first pass.
    model = toy(lora_dropout=p)
    call = lambda m, x: checkpoint(m, x, use_reentrant=reentrant)  # noqa: E731
    compare(model, batch(), call=call, fast=6)


def test_mixed_batch():
    model = toy(adapters=2).eval()
    names = ["default", "second", "__base__"]
    compare(model, batch(), call=lambda m, x: m(x, adapter_names=names), fast=0)
    layer = lora_layers(accelerated(model))[0]
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(torch.randn(3, 20), adapter_names=["default"])
    assert layer(torch.randn(3, 20), adapter_names=None).shape == (3, 24)


def test_loaded_adapter(tmp_path):
    toy(r=6).save_pretrained(tmp_path)
    state = lambda m: (m.load_adapter(tmp_path, "loaded"), m.set_adapter("loaded"))  # noqa: E731
    compare(toy(), batch(), state=state, fast=3)


def test_hotswap(tmp_path):
    # Makes every scaling a 0-d tensor and pads the ranks.
    toy(r=3, lora_alpha=9).save_pretrained(tmp_path)

    def state(model):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
        hotswap.hotswap_adapter(model, str(tmp_path), adapter_name="default")
        assert all(isinstance(layer.scaling["default"], torch.Tensor) for layer in lora_layers(model))

    compare(toy(lora_bias=False), batch(), state=state, fast=3)
    compare(
        toy(adapters=2), batch(), state=lambda m: (state(m), m.base_model.set_adapter(["default", "second"])), fast=3
    )


def test_rescaled_for_a_while():
    model = toy()

    def call(m, x):
        with rescale_adapter_scale(m, 0.25):
            return m(x)

    compare(model, batch(), call=call, fast=3)


def test_disabled_for_a_while():
    def call(m, x):
        with m.disable_adapter():
            off = m(x)
        return off + m(x)

    compare(toy(), batch(), call=call, fast=3)


def test_casting_disabled():
    # PEFT then multiplies an fp32 A with a bf16 x, which raises; so must we.
    model = accelerated(toy(base=torch.bfloat16))
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(2, 20, dtype=torch.bfloat16))


def test_own_errors():
    model = accelerated(toy())
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(2, 20, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 20, dtype=torch.int64))
