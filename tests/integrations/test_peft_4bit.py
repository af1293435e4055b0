"""PEFT's Linear4bit over bitsandbytes' weights: outputs and every gradient against PEFT's own autograd, state by state."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="peft is not installed")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

from fastpeft.integrations import accelerate
from fastpeft.integrations.peft import reason
from fastpeft.ops import Weight4bit, dequantize_4bit
from peft_4bit_cases import BF16, F16, F32, TARGETS, batch, compare, layers, toy
from peft_cases import run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def each(method, *args):
    return lambda model: [getattr(layer, method)(*args) for layer in layers(model)]


def set_two(model):
    model.base_model.set_adapter(["default", "second"])


def drop_state(model):
    # What FSDP leaves: a plain parameter, and the state on the layer.
    for layer in layers(model):
        base = layer.base_layer
        base.quant_state = base.weight.quant_state
        base.weight = nn.Parameter(base.weight.data, requires_grad=False)


# name -> (arguments of toy, how the model gets into the state, calls of our operators in one forward)
STATES = {
    "plain": ({}, None, 2),
    "evaluating": ({"lora_dropout": 0.3}, lambda m: m.eval(), 2),
    "dropout": ({"lora_dropout": 0.3}, None, 2),
    "rslora": ({"use_rslora": True}, None, 2),
    "lora_bias": ({"lora_bias": True}, None, 2),
    "trained biases": ({"bias": "all"}, None, 2),
    "frozen adapter": ({}, lambda m: m.requires_grad_(False), 2),
    "only B trained": ({}, lambda m: [x.lora_A.requires_grad_(False) for x in layers(m)], 2),
    "merged": ({}, lambda m: m.merge_adapter(), 2),
    "merged, unmerged": ({}, lambda m: (m.merge_adapter(), m.unmerge_adapter()), 2),
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), 2),
    "enabled again": ({}, lambda m: (m.base_model.disable_adapter_layers(), m.base_model.enable_adapter_layers()), 2),
    "scale changed": ({}, each("set_scale", "default", 0.5), 2),
    "second adapter": ({"adapters": 2}, lambda m: m.set_adapter("second"), 2),
    "two active": ({"adapters": 2}, set_two, 2),
    "three, biased": (
        {"adapters": 3, "lora_bias": True},
        lambda m: m.base_model.set_adapter(["second2", "default", "second"]),
        2,
    ),
    "two, evaluating": ({"adapters": 2, "lora_dropout": 0.3}, lambda m: (set_two(m), m.eval()), 2),
    "two with dropout": ({"adapters": 2, "lora_dropout": 0.3}, set_two, 2),
    "none active": ({}, lambda m: m.base_model.set_adapter([]), 0),
    "one of two deleted": ({"adapters": 2}, lambda m: (m.set_adapter("second"), m.delete_adapter("default")), 2),
    "adapter added": ({}, lambda m: m.add_adapter("late", LoraConfig(r=2, target_modules=TARGETS)), 2),
    "dora": ({"use_dora": True}, None, 0),
    "hooked": ({}, lambda m: [x.base_layer.register_forward_hook(lambda *a: a[2] * 1.5) for x in layers(m)], 0),
    "hooks on the layer": ({}, lambda m: [x.register_forward_hook(lambda *a: a[2] * 1.5) for x in layers(m)], 2),
    "state on the layer": ({}, drop_state, 2),
    "scale a tensor": ({}, lambda m: [x.scaling.update(default=torch.tensor(1.5)) for x in layers(m)], 2),
}


@pytest.mark.parametrize("name", STATES)
def test_state(name):
    arguments, state, fast = STATES[name]
    found = compare(toy(**arguments), batch(), state=state, fast=fast)
    assert torch.isfinite(found["output"]).all()


@pytest.mark.parametrize("quant_storage", [torch.uint8, BF16, F16, F32])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_weights(quant_type, double_quant, quant_storage):
    quant = {"quant_type": quant_type, "compress_statistics": double_quant, "quant_storage": quant_storage}
    compare(toy(quant=quant, lora_dropout=0.2), batch())


# input, compute dtype, adapter -> what the result and the gradients can be compared to
@pytest.mark.parametrize("adapter", [F32, BF16])
@pytest.mark.parametrize("compute", [None, F32, BF16, F16])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_dtypes(dtype, compute, adapter):
    model = toy(quant={"compute_dtype": compute}, lora_dropout=0.3, bias="all")
    for layer in layers(model):
        layer.lora_A.to(adapter)
        layer.lora_B.to(adapter)
    eps = max(torch.finfo(each).eps for each in (dtype, compute or dtype, adapter))
    compare(model, batch(dtype), eps=eps)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("compute", [None, F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast(dtype, compute, p):
    context = partial(torch.autocast, "cpu", BF16)
    model = toy(quant={"compute_dtype": compute}, lora_dropout=p)
    compare(model, batch(dtype), context=context, eps=torch.finfo(BF16).eps)


def test_autocast_to_another_half():
    # PEFT's result is then of a dtype that depends on the device.
    model = toy()
    compare(model, batch(F16), context=partial(torch.autocast, "cpu", BF16), fast=0)
    with torch.autocast("cpu", BF16):
        assert (
            reason(layers(model)[0], batch(F16)["x"]) == "the input is torch.float16 under autocast to torch.bfloat16"
        )


def test_gradients_of_a_wide_adapter_stay_exact():
    # fp32 hidden states over a bf16 product, as prepare_model_for_kbit_training has it: the adapter works in fp32.
    model = layers(toy(quant={"compute_dtype": BF16}, lora_bias=True))[0]
    inputs = batch()
    found = run(accelerated := copy.deepcopy(model), inputs, None, 3)
    accelerate(accelerated)
    ours = run(accelerated, inputs, None, 3)
    for name in ("lora_A.default.weight", "lora_B.default.weight", "lora_B.default.bias"):
        torch.testing.assert_close(ours[name], found[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 3, 5, 64)])
def test_shapes(shape):
    compare(toy(), batch(shape=shape))


def test_blocks_that_straddle_rows():
    # bitsandbytes 0.50 itself dequantises them wrongly on a CPU (0.50.2), so that PEFT is no measure here.
    model = toy(quant={"sizes": (13, 8, 9)})
    plain = copy.deepcopy(model)
    for layer in layers(plain):
        base = layer.base_layer
        linear = nn.Linear(base.in_features, base.out_features, base.bias is not None)
        linear.weight = nn.Parameter(dequantize_4bit(Weight4bit.from_quant_state(base.weight.data, base.quant_state)))
        linear.bias = base.bias
        layer.base_layer = linear
    accelerate(model)
    x = batch(shape=(4, 13))["x"]
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, p):
    call = lambda m, x: checkpoint(m, x, use_reentrant=reentrant)  # noqa: E731
    compare(toy(lora_dropout=p), batch(), call=call, fast=4)


def test_mixed_batch():
    @torch.no_grad()
    def mixed(m, x):
        return m(x, adapter_names=["default", "second", "__base__"])

    def state(m):
        m.eval()
        for layer in layers(m):  # as the accelerated one does for the length of a call
            layer.base_layer.support_avx512bf16_for_cpu = False

    compare(toy(adapters=2), batch(), state=state, call=mixed, fast=0)


def test_loaded_adapter(tmp_path):
    toy(r=6).save_pretrained(tmp_path)
    compare(toy(), batch(), state=lambda m: (m.load_adapter(tmp_path, "loaded"), m.set_adapter("loaded")))


def test_compute_dtype_is_settled_by_the_first_input():
    ours, peer = toy(), toy()
    accelerate(ours)
    for dtype in (BF16, F32, F16):
        for model in (ours, peer):
            assert model(batch(dtype)["x"]).dtype == dtype
        assert [x.base_layer.compute_dtype for x in layers(ours)] == [x.base_layer.compute_dtype for x in layers(peer)]
        assert [x.base_layer.compute_type_is_set for x in layers(ours)] == [True, True]


def quantised(model):
    """Every Linear of a transformers model but its head, as loading in 4 bits makes it."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "head" not in name:
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, compute_dtype=BF16, quant_type="nf4"
            )
            new.load_state_dict(module.state_dict())
            model.set_submodule(name, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_training_a_model(kind):
    # A few steps of QLoRA's recipe, checkpointed: the losses are PEFT's.
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    if kind == "llama":
        config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)  # fmt: skip
        base, targets = (
            LlamaForCausalLM(config),
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        )
    else:
        config = BertConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                            num_attention_heads=4, max_position_embeddings=32, hidden_dropout_prob=0.0,
                            attention_probs_dropout_prob=0.0)  # fmt: skip
        base, targets = BertForMaskedLM(config), ["query", "key", "value", "dense"]
    base = peft.prepare_model_for_kbit_training(quantised(base))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_alpha=4))
    ours = copy.deepcopy(model)
    report = accelerate(ours)
    assert len(report.accelerated) == len(layers(ours)) >= 12, str(report)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(2))

    def losses(each):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=5e-3)
        each.train()
        found = []
        for _ in range(4):
            loss = each(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    found, wanted = losses(ours), losses(model)
    assert found[-1] < found[0]
    assert found == pytest.approx(wanted, rel=2e-2)
