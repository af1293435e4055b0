"""AdapterStack: what is beside and behind a layer, its merge, and what its owner reads through it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastpeft import Adapter, LoRALayer, LoRALinear, lora_disabled
from fastpeft.nn import AttentionGuidedLoRALayer
from fastpeft.nn.layers.stack import AdapterStack


def lora(K=8, N=6, rank=2, kind=LoRALayer, **options):
    module = kind(in_features=K, out_features=N, rank=rank, layout="out_in", dropout=0.0, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def stack(over="lora", bias=False):
    layer = nn.Linear(8, 6)
    if over == "lora":
        layer = LoRALinear(layer, rank=2, dropout=0.0, bias=bias)
        nn.init.normal_(layer.lora_B)
    made = AdapterStack(layer)
    made.add("one", lora(bias=bias))
    made.add("two", lora(rank=3))
    return made


@pytest.mark.parametrize("over", ["lora", "plain"])
def test_sum_merge_and_back(over):
    made, x = stack(over, bias=True), torch.randn(4, 8)
    want = made.layer(x) + made.parallel["one"](x) + made.parallel["two"](x)
    torch.testing.assert_close(made(x), want)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made.merge()
    assert made.merged
    torch.testing.assert_close(made(x), want)
    torch.testing.assert_close(nn.functional.linear(x, made.weight, made.bias), want)
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), name
    again = copy.deepcopy(made)
    torch.testing.assert_close(again(x), want)
    again.unmerge()
    assert torch.equal(again.weight, before["layer.weight"])
    made.load_state_dict(before)
    assert not made.merged
    torch.testing.assert_close(made(x), want)


@pytest.mark.parametrize("over", ["lora", "plain"])
def test_disabled_within_a_block_while_merged(over):
    made, x = stack(over), torch.randn(4, 8)
    base = nn.functional.linear(x, made.weight, made.bias)
    want = made(x)
    made.merge()
    with lora_disabled(made):
        torch.testing.assert_close(made(x), base)
    assert made.merged
    torch.testing.assert_close(made(x), want)


def test_a_layer_that_is_unmerged_by_itself_keeps_its_neighbours():
    made, x = stack(), torch.randn(4, 8)
    want = made(x)
    made.merge()
    made.layer.unmerge()
    assert not made.merged
    torch.testing.assert_close(made(x), want)


def test_disabled_adapters_take_no_part():
    made, x = stack(), torch.randn(4, 8)
    made.layer.disable()
    made.parallel["two"].disable()
    want = nn.functional.linear(x, made.weight, made.bias) + made.parallel["one"](x)
    torch.testing.assert_close(made(x), want)
    made.merge()
    torch.testing.assert_close(made(x), want)
    made.train()
    assert not made.merged


def test_serial_and_tuples():
    class Pair(nn.Module):
        def forward(self, x):
            return x * 2, "more"

    made, adapter = AdapterStack(Pair()), Adapter(8, 2)
    nn.init.normal_(adapter.up.weight)
    made.add("behind", adapter, serial=True)
    x = torch.randn(3, 8)
    y, more = made(x)
    torch.testing.assert_close(y, adapter(x * 2))
    assert more == "more"


def test_errors():
    made = stack()
    with pytest.raises(ValueError, match="name must be free, got 'one'"):
        made.add("one", lora())
    with pytest.raises(ValueError, match=r"name must be one of \['one', 'two'\], got 'three'"):
        made.pop("three")
    before = made.weight.clone()
    made.add("gate", lora(kind=AttentionGuidedLoRALayer))
    with pytest.raises(ValueError, match="must be one matrix"):
        made.merge()
    made.pop("gate")
    made.add("behind", Adapter(6, 2), serial=True)
    with pytest.raises(ValueError, match="serial must be empty"):
        made.merge()
    assert torch.equal(made.weight, before) and not made.merged
    made.pop("behind")
    made.merge()
    with pytest.raises(ValueError, match="unmerged for merge"):
        made.merge()
    with pytest.raises(AttributeError, match="nothing"):
        made.nothing  # noqa: B018


def test_what_owners_read_and_pickle():
    made = stack("plain")
    assert made.in_features == 8 and made.weight is made.layer.weight
    again = pickle.loads(pickle.dumps(made))
    x = torch.randn(2, 8)
    assert torch.equal(again(x), made(x))


def test_compile():
    made, x = stack(), torch.randn(4, 8)
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="eager")(x), made(x))
