"""LoRALinear's states: files, copies, merging and its rounding, the switch."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastpeft.nn import LoRALayer, LoRALinear, disable_lora, enable_lora, lora_disabled
from nn_cases import linear, trained

KEYS = ["weight", "bias", "lora_A", "lora_B", "lora_bias"]


@pytest.mark.parametrize("base_bias", [True, False])
@pytest.mark.parametrize("lora_bias", [True, False])
def test_state_dict_round_trip(base_bias, lora_bias):
    module = trained(base_bias=base_bias, bias=lora_bias)
    state = module.state_dict()
    have = {"weight", "bias" if base_bias else "", "lora_A", "lora_B", "lora_bias" if lora_bias else ""}
    assert list(state) == [key for key in KEYS if key in have]
    other = trained(base_bias=base_bias, bias=lora_bias, seed=1)
    other.load_state_dict(state)
    x = torch.randn(3, 32)
    assert torch.equal(other(x), module(x))


def test_linear_checkpoint_both_ways():
    base, module = linear(seed=5), trained()
    report = module.load_state_dict(base.state_dict(), strict=False)
    assert report.missing_keys == ["lora_A", "lora_B", "lora_bias"] and not report.unexpected_keys
    assert torch.equal(module.weight, base.weight)
    plain = linear(seed=6)
    plain.load_state_dict(module.state_dict(), strict=False)
    assert torch.equal(plain.weight, base.weight)


@pytest.mark.parametrize("keep_backup", [True, False, None])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(clone, keep_backup):
    module = trained()
    if keep_backup is not None:
        module.merge(keep_backup)
    other = clone(module)
    x = torch.randn(3, 32)
    assert repr(other) == repr(module) and torch.equal(other(x), module(x))
    assert other.weight is not module.weight and not other.weight.requires_grad and other.lora_A.requires_grad
    if keep_backup is not None:
        other.unmerge(), module.unmerge()
        assert torch.equal(other.weight, module.weight) and torch.equal(other.bias, module.bias)


@pytest.mark.parametrize("base_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_merge(dtype, base_bias, layout):
    module = trained(dtype=dtype, base_bias=base_bias, layout=layout).eval()
    weight, state = module.weight.detach().clone(), copy.deepcopy(module.state_dict())
    exact = weight.double() + module.delta_weight().double()
    x = torch.randn(5, 32).to(dtype)
    y = module(x)
    report = module.merge()
    assert module.merged and report.dtype == dtype and list(module.state_dict()) == list(state)
    assert torch.equal(module.weight, exact.to(dtype)) or dtype == torch.float32
    lost = module.weight.double() - exact
    assert report.max_abs_error == pytest.approx(lost.abs().max().item(), rel=0.01, abs=1e-7)
    share = lost.norm() / module.delta_weight().norm()
    assert report.relative_error_of_update == pytest.approx(share.item(), rel=0.01, abs=1e-6)
    assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))
    if dtype == torch.float32:
        torch.testing.assert_close(module(x), y)
    unmerged = module.unmerge()
    assert unmerged.max_abs_error == unmerged.relative_error_of_update == 0
    assert list(module.state_dict()) == list(state)
    assert all(torch.equal(module.state_dict()[key], state[key]) for key in state)


def test_merge_loses_small_updates_in_bf16():
    """An update below half a rounding step of W is lost whole, and the report says so."""
    module = trained(dtype=torch.bfloat16)
    with torch.no_grad():
        module.lora_B.mul_(1e-4)
    assert module.merge().relative_error_of_update > 0.5
    module = trained()
    assert module.merge().relative_error_of_update < 1e-5
    assert LoRALinear(8, 6).merge().relative_error_of_update == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmerge_without_backup(dtype):
    module = trained(dtype=dtype)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    module.merge(keep_backup=False)
    assert not module.has_backup
    with torch.no_grad():
        module.lora_B.zero_()  # what was added is taken out, not what the factors are now
    assert module.unmerge().max_abs_error > 0
    step = torch.finfo(dtype).eps * max(weight.abs().max().item(), 1.0) * 4
    torch.testing.assert_close(module.weight, weight, rtol=0, atol=step)
    torch.testing.assert_close(module.bias, bias, rtol=0, atol=step * 4)


def test_merged_state():
    """A merged module saves and loads as the unmerged one; train and disable unmerge; what cannot be told raises."""
    module = trained(base_bias=False).eval()
    x = torch.randn(3, 32)
    y, state = module(x), copy.deepcopy(module.state_dict())
    module.merge()
    assert module.bias is not None and list(module.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    module.load_state_dict(state)
    assert not module.merged and module.bias is None and torch.equal(module(x), y)
    module.merge()
    assert not module.train().merged and module.training
    with pytest.raises(ValueError, match="LoRALinear: state must be merged for unmerge"):
        module.unmerge()
    module.merge(keep_backup=False)
    with pytest.raises(ValueError, match="state_dict must be taken unmerged"):
        module.state_dict()
    with pytest.raises(ValueError, match="state must be unmerged for merge"):
        module.merge()
    with pytest.raises(ValueError, match="state must be unmerged for reset_parameters"):
        module.reset_parameters()
    module.disable()
    assert not module.merged
    with pytest.raises(ValueError, match="state must be enabled for merge"):
        module.merge()


def test_merge_overflow_changes_nothing():
    module = trained(dtype=torch.float16)
    with torch.no_grad():
        module.lora_B.fill_(1e6)
    weight = module.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weight must stay finite in torch\.float16"):
        module.merge()
    assert torch.equal(module.weight, weight) and not module.merged


def test_merge_follows_the_module():
    """The backup goes where the module goes."""
    module = trained()
    module.merge()
    module.to(torch.float64)
    module.unmerge()
    assert torch.equal(module.weight, trained().weight.double())


@pytest.mark.parametrize("base_bias", [True, False])
def test_to_linear(base_bias):
    module = trained(base_bias=base_bias).eval()
    x = torch.randn(3, 32)
    plain = module.to_linear()
    assert type(plain) is nn.Linear and not plain.training and not plain.weight.requires_grad
    assert plain.weight.data_ptr() != module.weight.data_ptr()
    torch.testing.assert_close(plain(x), module(x))
    module.merge()
    assert torch.equal(module.to_linear()(x), module(x))
    module.disable()
    assert torch.equal(module.to_linear()(x), module(x))


@pytest.mark.parametrize("merged", [False, True])
def test_switch(merged):
    """Off means the very bits of the base model; on again, those of the adapted one."""
    base = nn.Sequential(linear(), nn.ReLU(), linear(24, 8, seed=1))
    model = nn.Sequential(trained(), nn.ReLU(), trained(K=24, N=8, seed=1)).eval()
    if merged:
        model[0].merge()
    x = torch.randn(3, 32)
    y = model(x)
    assert not torch.equal(y, base(x))
    with lora_disabled(model):
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), y) and model[0].merged == merged
    assert disable_lora(model) == 2 and not model[0].enabled and torch.equal(model(x), base(x))
    with lora_disabled(model):
        pass
    assert not model[0].enabled
    assert enable_lora(model) == 2
    torch.testing.assert_close(model(x), y)
    layer = LoRALayer(32, 24, init="orthogonal", rank=4)
    layer.disable()
    assert layer(x).shape == (3, 24) and not layer(x).any()
