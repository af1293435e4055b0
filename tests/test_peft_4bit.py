"""PEFT's Linear4bit over bitsandbytes' weights: outputs and every gradient against PEFT's own autograd, state by state."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="peft is not installed")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt  # noqa: E402
from torch._dynamo.backends.debugging import aot_eager  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from fastpeft.integrations import accelerate, peft_bnb, restore  # noqa: E402
from fastpeft.integrations.peft import reason  # noqa: E402
from fastpeft.ops import Weight4bit, dequantize_4bit  # noqa: E402
from peft_cases import RecoveredDropout, budget, doubled, run  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TARGETS = ["lin0", "inner.lin1"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
        weight = bnb.functional.dequantize_4bit(base.weight.data, peft_bnb.state_of(base)).double()
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
        operator = getattr(peft_bnb, name)
        patch.setattr(peft_bnb, name, lambda *a, operator=operator, **k: calls.append(operator) or operator(*a, **k))
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
    "merged": ({}, lambda m: m.merge_adapter(), 0),
    "merged, unmerged": ({}, lambda m: (m.merge_adapter(), m.unmerge_adapter()), 2),
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), 0),
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
    "two with dropout": ({"adapters": 2, "lora_dropout": 0.3}, set_two, 0),
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
    model = toy(quant={"sizes": (13, 7, 9)})
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

    compare(toy(adapters=2), batch(), state=lambda m: m.eval(), call=mixed, fast=0)


def test_fsdp2(tmp_path):
    # Gathered, the weight is a plain tensor; its state is found on the layer.
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = toy(quant={"quant_storage": F32, "compute_dtype": F32})
        wanted = run(copy.deepcopy(model), batch(), None, 3)
        accelerate(model)
        fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
        assert "sharded" in reason(layers(model)[0])
        with pytest.MonkeyPatch.context() as patch:
            calls = counted(patch)
            found = run(model, batch(), None, 3)
        assert len(calls) == 2
        for name, value in wanted.items():
            ours = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
            torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-5)
        assert restore(model) == 2
    finally:
        distributed.destroy_process_group()


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


def test_evaluation_does_not_repack():
    model = toy().eval()
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    accelerate(model)
    with torch.no_grad():
        model(batch()["x"])
    assert not any(hasattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu") for layer in layers(model))
    for key, value in model.state_dict().items():
        assert torch.equal(value, keys[key]), key


def repack(base):
    data, base.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        base.weight.data, base.weight.quant_state
    )
    base.weight.data = data


def test_repacked_weight_is_left_to_peft():
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks only for a CPU with AVX-512-BF16")
    model = toy(quant={"compute_dtype": BF16}).eval()
    accelerate(model)
    repack(layers(model)[0].base_layer)
    report = accelerate(model)
    assert "has repacked the weight" in report.skipped["base_model.model.lin0"] and len(report.accelerated) == 1
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        model(batch(BF16)["x"])
    assert len(calls) == 1


def test_weight_is_read_at_every_call():
    model = toy()
    accelerate(model)
    x = batch()["x"]
    layer = layers(model)[0]
    for change in (
        lambda base: base.weight.data.add_(17),
        lambda base: setattr(base.weight, "data", base.weight.data.flip(0)),
        lambda base: base.weight.quant_state.offset.mul_(2),
        lambda base: setattr(base.weight.quant_state, "absmax", base.weight.quant_state.absmax.flip(0)),
        lambda base: setattr(base, "weight", Toy().lin0.weight),
    ):
        change(layer.base_layer)
        ours = layer(x)
        restore(layer)
        wanted = layer(x)
        accelerate(layer)
        torch.testing.assert_close(ours, wanted)


def test_weight_written_to_before_backward_is_noticed():
    layer = layers(toy())[0]
    accelerate(layer)
    x = batch()["x"].requires_grad_()
    y = layer(x)
    with torch.no_grad():
        layer.base_layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies():
    model = toy()
    accelerate(model)
    x = batch()["x"]
    wanted = model(x)
    deep = copy.deepcopy(model)
    assert accelerate(deep).changed == 0
    torch.testing.assert_close(deep(x), wanted, rtol=0, atol=0)
    assert reason(copy.copy(layers(model)[0])) is None
    data = pickle.dumps(model)
    assert b"fastpeft" not in data
    loaded = pickle.loads(data)
    assert {type(layer) for layer in layers(loaded)} == {Linear4bit}
    torch.testing.assert_close(loaded(x), wanted)


def test_saved_bytes_and_keys(tmp_path):
    model = toy(lora_bias=False)
    model.save_pretrained(tmp_path / "plain")
    before, text = model.state_dict(), repr(model)
    assert accelerate(model).accelerated == ["base_model.model.lin0", "base_model.model.inner.lin1"]
    assert repr(model) == text and all(isinstance(layer, Linear4bit) for layer in layers(model))
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    model.save_pretrained(tmp_path / "ours")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
    again = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "ours")
    accelerate(again)
    torch.testing.assert_close(again(batch()["x"]), model(batch()["x"]))


def test_restore_leaves_no_trace():
    model = toy(adapters=2, lora_dropout=0.2)
    x = batch()["x"]
    model(x).sum().backward()

    def attributes():
        return [(type(m), dict(vars(m))) for m in model.modules()] + [dict(vars(p)) for p in model.parameters()]

    before = attributes()
    accelerate(model)
    model(x).sum().backward()
    assert (restore(model), restore(model)) == (2, 0)
    after = attributes()
    for one, other in zip(before, after, strict=True):
        if isinstance(one, dict):
            assert one.keys() == other.keys()
        else:
            assert one[0] is other[0] and one[1].keys() == other[1].keys()


@pytest.mark.parametrize("method", ["unload", "merge_and_unload"])
def test_unload(method):
    model = toy()
    x = batch()["x"]
    wanted = getattr(copy.deepcopy(model), method)()(x)
    accelerate(model)
    plain = getattr(model, method)()
    assert not layers(plain)
    torch.testing.assert_close(plain(x), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compile(p):
    model = toy(lora_dropout=p, lora_bias=True, quant={"compute_dtype": F32})
    accelerate(model)
    x = batch()["x"]
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def grads(call):
        model.zero_grad()
        call(x).square().sum().backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    wanted = grads(model)
    torch._dynamo.reset()
    found = grads(torch.compile(model, backend=counting, fullgraph=True))
    assert found and len(graphs) == 1
    if p == 0:
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value)


def test_report_and_reasons():
    layer = layers(toy())[0]
    x = batch()["x"]
    assert reason(layer) is None and reason(layer, x) is None
    assert reason(layer, x[..., :20]) == "the input is [3, 5, 20] for a weight of [128, 64]"
    assert reason(layer, x.double()) == "the input is torch.float64"
    assert reason(layer, x, kwargs={"adapter_names": ["default"] * 3}) == "mixed batch (adapter_names)"
    base = layer.base_layer
    changes = {
        "has not been quantised yet": lambda: vars(base.weight).update(quant_state=None) or vars(base).update(quant_state=None),
        "does not describe its weight": lambda: setattr(base, "weight", bnb.nn.Params4bit(base.weight.data[:64], quant_state=base.weight.quant_state)),
        "is not bitsandbytes' Linear4bit": lambda: setattr(layer, "base_layer", nn.Linear(64, 96)),
        "the weight of base_layer is a ": lambda: setattr(base, "weight", type("Other", (nn.Parameter,), {})(base.weight.data, False)),
        "adapters are disabled": lambda: layer.enable_adapters(False),
        "forward of base_layer has been replaced": lambda: vars(base).update(forward=print),
    }  # fmt: skip
    for expected, change in changes.items():
        layer = layers(toy())[0]
        base = layer.base_layer
        accelerate(layer)
        change()
        assert expected in reason(layer), expected
        assert expected in accelerate(layer).skipped[""]


def test_eight_bits_are_left_to_peft():
    class Eight(nn.Module):
        is_loaded_in_8bit = True

        def __init__(self):
            super().__init__()
            self.lin = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)

    model = get_peft_model(Eight(), LoraConfig(target_modules=["lin"]))
    assert isinstance(model.base_model.model.lin, Linear8bitLt)
    report = accelerate(model)
    assert report.skipped["base_model.model.lin"].startswith("lora.Linear8bitLt: bitsandbytes multiplies 8-bit weights")


@pytest.mark.parametrize("version", ["0.47.0", "0.51.0", "unknown"])
def test_untested_bitsandbytes_is_left_alone(monkeypatch, version):
    monkeypatch.setattr(bnb, "__version__", version)
    report = accelerate(toy())
    assert set(report.skipped.values()) == {f"bitsandbytes {version} is outside the tested range >=0.48,<0.51"}


def test_replaced_forward_is_left_alone(monkeypatch):
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: x)
    assert "bitsandbytes' Linear4bit.forward has been replaced" in accelerate(toy()).skipped["base_model.model.lin0"]


def test_bitsandbytes_is_not_imported():
    code = (
        "import sys, torch, fastpeft.integrations as f; f.accelerate(torch.nn.Linear(2, 2));"
        "assert 'bitsandbytes' not in sys.modules and 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
