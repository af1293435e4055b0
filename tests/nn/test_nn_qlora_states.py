"""QLoRALinear's states: casts, copies, and files in bitsandbytes' keys."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fastpeft.nn import QLoRALinear
from nn_cases import linear
from qlora_cases import PARTS, fixed, same, trained, without

CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to_dtype": lambda module: module.to(torch.float16),
    "to_both": lambda module: module.to("cpu", torch.bfloat16),
    "type": lambda module: module.type(torch.float16),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_leave_the_bytes(cast, double_quant, merged):
    """Adapter and bias follow, packed bytes and scales never; nor does the backup of a merge."""
    module = trained(double_quant=double_quant)
    before = fixed(module)
    if merged:
        module.merge()
    held = fixed(module)
    cast(module)
    assert same(fixed(module), held)
    assert module.lora_A.dtype == module.bias.dtype != torch.float32
    if merged:
        module.unmerge()
    assert same(fixed(module), before)
    assert module.eval()(torch.randn(3, 32)).dtype == torch.float32


def test_meta_and_empty():
    module = QLoRALinear(32, 24, device="meta")
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    source = trained(layout="in_out")
    module = QLoRALinear(32, 24, rank=4, bias=True, device="meta", double_quant=False)
    module.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 32)
    module.scaling = source.scaling
    assert torch.equal(module.eval()(x), source.eval()(x))
    empty = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    empty.load_state_dict(source.state_dict())
    assert torch.equal(empty(x), source(x))


@pytest.mark.parametrize("double_quant", [True, False])
def test_meta_state_dict(double_quant):
    """Its keys, shapes and dtypes without a value; what lies in the JSON bytes is never taken for one."""
    source = trained(double_quant=double_quant)
    module, real = copy.deepcopy(source).to("meta"), source.state_dict()
    state, name = module.state_dict(), "weight.quant_state.bitsandbytes__nf4"
    assert list(state) == list(real)
    for key in state.keys() - {name}:
        assert state[key].is_meta and (state[key].shape, state[key].dtype) == (real[key].shape, real[key].dtype)
    assert set(module.load_state_dict({}, strict=False).missing_keys) == set(real)
    module.load_state_dict(state, assign=True)
    assert module.weight.is_meta and module.absmax.is_meta
    if double_quant:
        with pytest.raises(RuntimeError, match="nested_offset must be a number, got None"):
            source.load_state_dict(real | {name: state[name]})
    module.load_state_dict(real, assign=True)
    x = torch.randn(3, 32)
    assert torch.equal(module(x), source(x))


def reloaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), reloaded])
def test_copies(clone, merged):
    module = trained()
    if merged:
        module.merge()
    other, x = clone(module), torch.randn(3, 32)
    assert repr(other) == repr(module) and torch.equal(other(x), module(x))
    assert other.weight is not module.weight and not other.weight.requires_grad and other.lora_A.requires_grad
    if merged:
        other.unmerge(), module.unmerge()
    assert same(fixed(other), fixed(module))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_state_dict_round_trip(quant_type, double_quant):
    """Into a module of any other format: the checkpoint decides."""
    module = trained(quant_type=quant_type, double_quant=double_quant, block_size=32)
    state = module.state_dict()
    parts = [name for name in PARTS if double_quant or "nested" not in name]
    parts.append(f"weight.quant_state.bitsandbytes__{quant_type}")
    assert set(state) == {"weight", "bias", "lora_A", "lora_B", "lora_bias", *parts}
    x = torch.randn(3, 32)
    for options in ({}, {"quant_type": "fp4"}, {"double_quant": False}, {"block_size": 128}):
        other = trained(seed=1, **options)
        other.load_state_dict(state)
        assert torch.equal(other(x), module(x)) and same(other.state_dict(), state)
        assert other.weight.data_ptr() != module.weight.data_ptr()
    parent = nn.Sequential(nn.Identity(), trained(seed=2))
    parent.load_state_dict({f"1.{name}": value for name, value in state.items()})
    assert torch.equal(parent(x), module(x))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert same(torch.load(file), state)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_both_ways(storage, quant_type, double_quant):
    """One of its checkpoints in ours and one of ours in its Linear4bit, as transformers loads it; the same bytes."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    options = {"quant_type": quant_type, "compress_statistics": double_quant, "quant_storage": storage}
    theirs = bitsandbytes.nn.Linear4bit(128, 48, **options)
    theirs.load_state_dict(linear(128, 48).state_dict())
    theirs = theirs.to("cpu")
    state = theirs.state_dict()
    module = QLoRALinear(linear(128, 48, seed=3), rank=4)
    report = module.load_state_dict(state, strict=False)
    assert set(report.missing_keys) == {"lora_A", "lora_B"} and not report.unexpected_keys
    x = torch.randn(5, 128)
    torch.testing.assert_close(module(x), theirs(x))
    ours = module.state_dict()
    assert state.keys() <= ours.keys()
    for name, value in state.items():
        assert torch.equal(ours[name], value.view(torch.uint8).view(-1, 1) if name == "weight" else value), name

    back = bitsandbytes.nn.Linear4bit(128, 48, **options)
    dotted = {name: value for name, value in ours.items() if name.startswith("weight.")}
    back.weight = bitsandbytes.nn.Params4bit.from_prequantized(ours["weight"], dict(dotted), device="cpu", module=back)
    back.load_state_dict({"weight": ours["weight"], "bias": ours["bias"]})
    torch.testing.assert_close(back(x), theirs(x))
    assert all(torch.equal(back.state_dict()[name], ours[name]) for name in state)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda s: linear().state_dict(), "weight must be quantised in a state dict.* got torch.float32"),
        (lambda s: without(s, "weight.absmax"), "parts must be .*absmax"),
        (lambda s: without(s, "weight"), "weight must come with its parts, got only"),
        (lambda s: s | {"weight": s["weight"][:-1]}, r"parts.packed must have shape \[384\], got \[383\]"),
        (lambda s: s | {"weight.SCB": s["weight"]}, "parts must be .*SCB"),
        (lambda s: trained(K=24, N=32).state_dict(), r"weight must have shape \[24, 32\], got \[32, 24\]"),
        (lambda s: s | {"lora_A": torch.ones(5, 32)}, r"lora_A must have shape \[4, 32\], got \[5, 32\]"),
        (lambda s: s | {"lora_A": [1, 2]}, "QLoRALinear: lora_A must be a tensor, got list"),
        (lambda s: s | {"lora_bias": None}, "QLoRALinear: lora_bias must be a tensor, got NoneType"),
        (lambda s: s | {"weight": [1]}, "QLoRALinear: weight must be a tensor, got list"),
        (lambda s: {"weight": None}, "QLoRALinear: weight must be a tensor, got NoneType"),
        (lambda s: s | {"weight.quant_map": None}, "Weight4bit: quant_map must be a tensor, got NoneType"),
        (lambda s: s | {"weight.absmax": s["weight.absmax"].float()}, "parts.absmax must be torch.uint8"),
    ],
)
def test_bad_state_dict_changes_nothing(change, text):
    module = trained(seed=1)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=text):
        module.load_state_dict(change(trained().state_dict()), strict=False)
    assert same(module.state_dict(), before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_weight_has_the_shape_of_its_files(merged, assign):
    """A loader that compares the Parameter with the file finds one shape; a flat weight loads too."""
    module, x = trained().eval(), torch.randn(3, 32)
    y, state = module(x), copy.deepcopy(module.state_dict())
    assert module.weight.shape == state["weight"].shape == (384, 1)
    assert all(state[name].shape == parameter.shape for name, parameter in module.named_parameters())
    for weight in (state["weight"], state["weight"].view(-1)):
        other = trained(seed=1).eval()
        if merged:
            other.merge()
        other.load_state_dict(state | {"weight": weight}, assign=assign)
        assert other.weight.shape == (384, 1) and torch.equal(other(x), y)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_accelerate_offloads(to, double_quant, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    module = nn.Sequential(trained(double_quant=double_quant), nn.ReLU()).eval()
    x = torch.randn(3, 32)
    y, device = module(x), torch.device("cpu")
    if to == "cpu":
        module = accelerate.cpu_offload(module, device)
    else:
        module = accelerate.disk_offload(module, tmp_path, device)
    assert module[0].weight.is_meta and torch.equal(module(x), y)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("quant_type, double_quant", [("nf4", True), ("fp4", False)])
def test_distributed_state_dict(quant_type, double_quant, merged):
    """torch.distributed.checkpoint.state_dict, which looks up every dotted key as attributes; no process group."""
    states = pytest.importorskip("torch.distributed.checkpoint.state_dict", reason="torch without torch.distributed")
    options = {"quant_type": quant_type, "double_quant": double_quant}
    module, other = (nn.Sequential(nn.Sequential(trained(seed=seed, **options))).eval() for seed in (0, 1))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    x = torch.randn(3, 32)
    module(x).sum().backward(), optimizer.step()
    y = module(x)
    if merged:
        module[0][0].merge()
    state, optimizer_state = states.get_state_dict(module, optimizer)
    assert list(state) == list(module.state_dict()) and same(state, module.state_dict())
    assert set(optimizer_state["state"]) == {f"0.0.lora_{name}" for name in ("A", "B", "bias")}
    report = states.set_model_state_dict(other, state)
    assert not report.missing_keys and not report.unexpected_keys and torch.equal(other(x), y)


def test_adapter_alone():
    module, other = trained(), trained(seed=1)
    weight = fixed(other)
    adapter = {name: value for name, value in module.state_dict().items() if name.startswith("lora")}
    report = other.load_state_dict(adapter, strict=False)
    nf4 = "weight.quant_state.bitsandbytes__nf4"
    assert set(report.missing_keys) == {"weight", "bias", *PARTS, nf4} and not report.unexpected_keys
    assert torch.equal(other.lora_B, module.lora_B) and same(fixed(other), weight)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        other.load_state_dict(adapter)

    # As torch.distributed.checkpoint has it without the parameters that are frozen: the scales must be those held.
    trainable = without(module.state_dict(), "weight")
    again = trained()
    assert again.load_state_dict(trainable, strict=False).missing_keys == ["weight"]
    with pytest.raises(RuntimeError, match="weight must come with its parts"):
        other.load_state_dict(trainable, strict=False)
