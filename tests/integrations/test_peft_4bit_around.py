"""What is done to an accelerated 4-bit PEFT model from outside: its weights, copies, files, sharding, compilation; the report."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="peft is not installed")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch._dynamo.backends.debugging import aot_eager

from fastpeft.integrations import accelerate, restore
from fastpeft.integrations.peft import reason
from peft_4bit_cases import BF16, F32, Toy, batch, counted, layers, toy
from peft_cases import run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


def mixed(model):
    model(batch()["x"], adapter_names=["default", "__base__", "default"])


def disabled(model):
    with model.disable_adapter():
        model(batch()["x"])


def dora(model):
    for layer in layers(model):
        layer.lora_variant["default"] = _Variant
    model(batch()["x"])


class _Variant:
    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        return result


@pytest.mark.parametrize(
    "evaluate", [lambda m: m(batch()["x"]), mixed, disabled, dora], ids=["plain", "mixed", "disabled", "variant"]
)
def test_evaluation_does_not_repack(evaluate):
    """Also where PEFT's own forward runs: a repacked weight has wrong gradients from then on."""
    model = toy(adapters=2).eval()
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    accelerate(model)
    with torch.no_grad():
        evaluate(model)
    assert not any(hasattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu") for layer in layers(model))
    for key, value in model.state_dict().items():
        assert torch.equal(value, keys[key]), key


class Deep(nn.Module):
    """Two layers of 4 bits above one with an adapter."""

    is_loaded_in_4bit = True

    def __init__(self):
        super().__init__()
        self.lin0, self.above, self.top = (
            bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=F32, quant_type="nf4") for _ in range(3)
        )
        self.to("cpu")

    def forward(self, x):
        return self.top(torch.tanh(self.above(torch.tanh(self.lin0(x)))))


def test_layers_without_adapter_are_not_repacked_while_the_model_trains(tmp_path):
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks only for a CPU with AVX-512-BF16")
    model = get_peft_model(Deep(), LoraConfig(r=4, target_modules=["lin0"], init_lora_weights=False))
    x = batch()["x"]

    def losses(model, evaluate):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        found = []
        for _ in range(4):
            if evaluate:
                with torch.no_grad():
                    model.eval()(x)
            loss = model.train()(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    ours, kinds = copy.deepcopy(model), [type(module) for module in model.modules()]
    report = accelerate(ours)
    names = [f"base_model.model.{name}" for name in ("lin0.base_layer", "above", "top")]
    assert report.unpacked == names and not report.repacked
    assert "3  4-bit layers kept from bitsandbytes' repacking" in str(report)
    wanted = losses(copy.deepcopy(model), evaluate=False)
    assert losses(ours, evaluate=True) == pytest.approx(wanted, rel=1e-4) and wanted[-1] < 0.99 * wanted[0]
    twin = pickle.loads(pickle.dumps(ours))
    assert [type(module) for module in twin.modules()] == kinds
    assert restore(ours) == 1 and [type(module) for module in ours.modules()] == kinds
    # Taken out, or where nothing trains, bitsandbytes does what it does.
    for each in (ours, twin.requires_grad_(False)):
        accelerate(twin)
        with torch.no_grad():
            each.eval()(x)
        assert each.base_model.model.top.weight.quant_state.packing_format_for_cpu
    report = accelerate(ours)
    assert report.repacked == names and "3  4-bit layers repacked already" in str(report)
    ours.state_dict()
    assert accelerate(ours).unpacked == names


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
    assert (
        reason(layer, x, kwargs={"adapter_names": ["default", "__base__", "default"]}) == "mixed batch (adapter_names)"
    )
    base = layer.base_layer
    changes = {
        "has not been quantised yet": lambda: vars(base.weight).update(quant_state=None) or vars(base).update(quant_state=None),
        "does not describe its weight": lambda: setattr(base, "weight", bnb.nn.Params4bit(base.weight.data[:64], quant_state=base.weight.quant_state)),
        "is not bitsandbytes' Linear4bit": lambda: setattr(layer, "base_layer", nn.Linear(64, 96)),
        "the weight of base_layer is a ": lambda: setattr(base, "weight", type("Other", (nn.Parameter,), {})(base.weight.data, False)),
        "adapters are disabled": lambda: (layer.merge(), layer.enable_adapters(False), layer.merged_adapters.append("default")),
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


@pytest.mark.parametrize("version", ["0.48.2", "0.51.0", "unknown"])
def test_untested_bitsandbytes_is_left_alone(monkeypatch, version):
    monkeypatch.setattr(bnb, "__version__", version)
    report = accelerate(toy())
    assert set(report.skipped.values()) == {f"bitsandbytes {version} is outside the tested range >=0.49,<0.51"}


def test_replaced_forward_is_left_alone(monkeypatch):
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: x)
    assert "bitsandbytes' Linear4bit.forward has been replaced" in accelerate(toy()).skipped["base_model.model.lin0"]


def test_bitsandbytes_is_not_imported():
    code = (
        "import sys, torch, fastpeft.integrations as f; f.accelerate(torch.nn.Linear(2, 2));"
        "assert 'bitsandbytes' not in sys.modules and 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore:fastpeft:UserWarning")
@pytest.mark.parametrize("holder, attribute", [(bnb, "matmul_4bit"), (bnb.nn.Linear4bit, "forward")])
def test_replaced_after_accelerate(holder, attribute, monkeypatch):
    ours = layers(toy())[0]
    plain = copy.deepcopy(ours)
    assert accelerate(ours).accelerated
    function = getattr(holder, attribute)
    monkeypatch.setattr(holder, attribute, lambda *args, **kwargs: 2 * function(*args, **kwargs))
    x = batch()["x"]
    for disabled in (False, True):
        for layer in (ours, plain):
            layer.enable_adapters(not disabled)
        assert torch.equal(ours(x), plain(x))
        assert f"{attribute} has been replaced" in reason(ours)
