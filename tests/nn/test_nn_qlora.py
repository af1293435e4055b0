"""QLoRALinear: conventions, value, training, merging, the switch, errors."""

import copy

import pytest
import torch
from torch import nn

from fastpeft import ops, testing
from fastpeft.nn import LoRALinear, QLoRALinear, lora_disabled
from nn_cases import linear
from qlora_cases import fixed, same, trained


def definition(module, x, dtype):
    a, b = module.factors()
    x, a, b = (t.detach().to(dtype) for t in (x, a, b))
    w = module.dequantize(torch.float32).to(dtype)
    y = (x @ a.t() @ b.t() + module.lora_bias.detach().to(dtype)) * module.scaling
    return x @ w.t() + module.bias.detach().to(dtype) + y


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parity(dtype, layout, double_quant, quant_type):
    module = trained(dtype=dtype, layout=layout, double_quant=double_quant, quant_type=quant_type, backend="eager")
    assert module.lora_A.dtype == torch.float32
    x = torch.randn(2, 7, 32).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    gold = definition(module, x, torch.float64)
    testing.assert_within_budget(y, definition(module, x, dtype), gold, dtype)


@pytest.mark.parametrize(
    "module, shapes, scaling, dropout",
    [
        (QLoRALinear.from_linear(linear(64, 48)), ((16, 64), (48, 16)), 2.0, 0.05),
        (QLoRALinear.from_linear(linear(64, 48), rank=4, alpha=8, dropout=0.0), ((4, 64), (48, 4)), 2.0, 0.0),
        (QLoRALinear.from_linear(linear(64, 48), scaling=0.5, layout="in_out"), ((64, 16), (16, 48)), 0.5, 0.05),
        (QLoRALinear(linear(64, 48), 4, 8, 0.2), ((4, 64), (48, 4)), 2.0, 0.2),
        (QLoRALinear(original_layer=linear(64, 48), rank=4, bits=4), ((4, 64), (48, 4)), 4.0, 0.1),
        (QLoRALinear(64, 48, 4, 4), ((64, 4), (4, 48)), 0.01, 0.0),
        (QLoRALinear(in_features=64, out_features=48, rank=4, bits=4), ((64, 4), (4, 48)), 0.01, 0.0),
    ],
    ids=str,
)
def test_conventions(module, shapes, scaling, dropout):
    """Those of LoRALinear."""
    assert (tuple(module.lora_A.shape), tuple(module.lora_B.shape)) == shapes
    assert (module.scaling, module.dropout_probability) == (scaling, dropout)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert module.weight.dtype == torch.uint8 and module.weight.numel() == 64 * 48 // 2
    assert not module.lora_B.any()
    x = torch.randn(3, 64)
    expected = nn.functional.linear(x, module.dequantize(), module.bias)
    torch.testing.assert_close(module(x), expected)


def test_the_layer_is_left():
    layer = linear(64, 48).eval()
    before = copy.deepcopy(layer.state_dict())
    module = QLoRALinear.from_linear(layer)
    assert same(layer.state_dict(), before) and layer.weight.requires_grad
    assert module.bias is layer.bias and not layer.bias.requires_grad and not module.training
    assert QLoRALinear(8, 6, base_bias=False).bias is None
    step = 0.152 * ops.quantize_4bit(layer.weight, double_quant=False).absmax().max()
    assert (module.dequantize() - layer.weight).abs().max() < 1.05 * step


def test_repr():
    assert repr(trained(compute_dtype=torch.bfloat16, double_quant=False)) == (
        "QLoRALinear(in_features=32, out_features=24, bias=True, quant_type=nf4, block_size=64, double_quant=False, "
        "compute_dtype=bfloat16, rank=4, alpha=8, scaling=2, dropout=0, init=kaiming, lora_bias=True, layout=out_in)"
    )
    module = trained()
    module.merge()
    assert repr(module).endswith("layout=out_in, merged)")


def test_training():
    """The loss falls, only the adapter moves, and no weight gradient exists."""
    module = QLoRALinear(linear(), 4, 8.0, 0.1, bias=True)
    before, names = fixed(module), copy.deepcopy(module.state_dict())
    x, target = torch.randn(64, 32), torch.randn(64, 24)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, names[name])}
    assert moved == {"lora_A", "lora_B", "lora_bias"} and same(fixed(module), before)


@pytest.mark.parametrize("base_bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge(dtype, double_quant, base_bias):
    module = trained(dtype=dtype, double_quant=double_quant, base_bias=base_bias).eval()
    before, state = fixed(module), copy.deepcopy(module.state_dict())
    exact = module.dequantize(torch.float32) + module.delta_weight()
    x = torch.randn(5, 32).to(dtype)
    y = module(x)
    report = module.merge()
    assert module.merged and report.dtype == torch.uint8 and not same(fixed(module), before)
    lost = module.dequantize(torch.float32) - exact
    assert report.max_abs_error == pytest.approx(lost.abs().max().item(), rel=1e-3)
    share = (lost.norm() / module.delta_weight().norm()).item()
    assert report.relative_error_of_update == pytest.approx(share, rel=1e-3)
    expected = nn.functional.linear(x, module.dequantize(dtype), module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-2, atol=1e-2)
    assert list(module.state_dict()) == list(state) and same(module.state_dict(), state)
    assert module.dequantize().dtype == dtype
    unmerged = module.unmerge()
    assert unmerged.max_abs_error == unmerged.relative_error_of_update == 0
    assert same(fixed(module), before) and same(module.state_dict(), state) and torch.equal(module(x), y)


def test_merged_state():
    module = trained().eval()
    x = torch.randn(3, 32)
    y, state = module(x), copy.deepcopy(module.state_dict())
    module.merge()
    merged = module(x)
    assert not torch.equal(merged, y)
    with lora_disabled(module):
        assert torch.equal(module(x), nn.functional.linear(x, module.dequantize(), module.bias))
    assert module.merged and torch.equal(module(x), merged)
    assert not module.train().merged and torch.equal(module.eval()(x), y)
    module.merge()
    module.load_state_dict(state)
    assert not module.merged and torch.equal(module(x), y)
    with pytest.raises(ValueError, match="QLoRALinear: keep_backup must be True over a base of 4 bits, got False"):
        module.merge(keep_backup=False)
    module.merge()
    with pytest.raises(ValueError, match="state must be unmerged for merge"):
        module.merge()
    module.disable()
    assert not module.merged
    with pytest.raises(ValueError, match="state must be enabled for merge"):
        module.merge()


def test_merge_overflow_changes_nothing():
    module = trained()
    with torch.no_grad():
        module.lora_A.fill_(1.0)
        module.lora_B.fill_(3e38)
    before = fixed(module)
    with pytest.raises(ValueError, match="weight must stay finite with the update"):
        module.merge()
    assert same(fixed(module), before) and not module.merged


@pytest.mark.parametrize("base_bias", [True, False])
def test_to_linear(base_bias):
    module = trained(base_bias=base_bias, dtype=torch.bfloat16).eval()
    x = torch.randn(3, 32)
    plain = module.to_linear(torch.float32)
    assert type(plain) is nn.Linear and not plain.training and not plain.weight.requires_grad
    torch.testing.assert_close(plain(x), module(x))
    assert module.to_linear().weight.dtype == torch.bfloat16
    module.merge()
    torch.testing.assert_close(module.to_linear(torch.float32)(x), module(x))
    module.disable()
    torch.testing.assert_close(module.to_linear(torch.float32)(x), module(x))


@pytest.mark.parametrize("given", [torch.float32, torch.float16])
def test_compute_dtype(given):
    """Computed in bf16, returned in x's dtype; autocast goes first."""
    module = trained(compute_dtype=torch.bfloat16, backend="eager")
    plain = trained(backend="eager")
    x = torch.randn(3, 32).to(given)
    y = module(x)
    assert y.dtype == given and torch.equal(y, plain(x.bfloat16()).to(given))
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(module(x), plain(x)) and module(x).dtype == torch.float16


def test_compile():
    module, x = trained(), torch.randn(3, 32)
    y = module(x)
    y.sum().backward()
    grad, module.lora_A.grad = module.lora_A.grad, None
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    compiled(x).sum().backward()
    torch.testing.assert_close(module.lora_A.grad, grad)


def test_against_lora_linear():
    """The same adapter on the dequantised weight."""
    module, x = trained(), torch.randn(5, 32)
    base = nn.Linear(32, 24)
    base.load_state_dict({"weight": module.dequantize(), "bias": module.bias})
    other = LoRALinear(base, 4, 8.0, 0.0, True)
    adapter = {name: value for name, value in module.state_dict().items() if name.startswith("lora")}
    other.load_state_dict(adapter, strict=False)
    torch.testing.assert_close(module(x), other(x))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: QLoRALinear.from_linear(linear(), bits=8), ValueError, "QLoRALinear: bits must be 4: .* got 8"),
        (lambda: QLoRALinear(32, 24, 4, bits=8), ValueError, "QLoRALinear: bits must be 4: .* got 8"),
        (lambda: QLoRALinear.from_linear(nn.Conv2d(3, 4, 1)), TypeError, "QLoRALinear: original_layer must be an nn.Linear.* Conv2d"),
        (lambda: QLoRALinear(linear(), init="pissa"), ValueError, "init must be a scheme that needs no base weight, got 'pissa'"),
        (lambda: QLoRALinear(linear(), quant_type="int4"), ValueError, "quant_type must be one of nf4, fp4, got 'int4'"),
        (lambda: QLoRALinear(linear(), block_size=63), ValueError, "block_size must be one of 32, .* got 63"),
        (lambda: QLoRALinear(linear(), compute_dtype=torch.int8), ValueError, "compute_dtype must be one of .* got torch.int8"),
        (lambda: QLoRALinear(linear(), rank=0), ValueError, "QLoRALinear: rank must be at least 1, got 0"),
        (lambda: QLoRALinear(linear(), backend="gpu"), ValueError, "backend must be one of None, cpp"),
        (lambda: QLoRALinear(8), TypeError, "out_features must be an integer, got NoneType"),
        (lambda: QLoRALinear(linear(), 4, rank=4), TypeError, "rank must be given once"),
        (lambda: QLoRALinear(8, 8, 4, 4, 4), TypeError, "arguments must be at most in_features, out_features, rank, bits by position"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
