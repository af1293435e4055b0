"""Adapter and AdapterFusion: definitions, the identity at init, two stages, refusals."""

import copy

import pytest
import torch
from torch import nn

from fastpeft import Adapter, AdapterFusion, disable_lora, testing


def adapter(kind="houlsby", dtype=torch.float32, dim=12, bottleneck=5, **options):
    module = Adapter(dim, bottleneck, kind=kind, dtype=dtype, **options)
    nn.init.normal_(module.up.weight, std=0.3)
    nn.init.normal_(module.up.bias, std=0.3)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh", "sigmoid"])
def test_adapter_parity(activation, dtype):
    module = adapter(dtype=dtype, activation=activation, scale=0.7)
    act = {"gelu": nn.functional.gelu, "silu": nn.functional.silu}.get(activation) or getattr(torch, activation)
    x = torch.randn(3, 4, 12, dtype=torch.float64).to(dtype)
    results = []
    for kind in (None, dtype, torch.float64):
        twin = copy.deepcopy(module) if kind is None else copy.deepcopy(module).to(kind)
        h = x.detach().to(kind or dtype).requires_grad_()
        y = twin(h) if kind is None else h + 0.7 * twin.up(act(twin.down(h)))
        torch.manual_seed(2)
        y.backward(torch.randn(y.shape, dtype=torch.float64).to(dtype).to(y.dtype))
        results.append({"y": y.detach(), "x": h.grad} | {name: p.grad for name, p in twin.named_parameters()})
    testing.assert_all_within_budget(*results, dtype)


def test_adapter_kinds_and_states():
    x = torch.randn(2, 12)
    for kind in ("houlsby", "pfeiffer"):
        torch.testing.assert_close(Adapter(12, 4, kind=kind)(x), x, rtol=0, atol=0)
    assert not Adapter(12, 4, kind="parallel")(x).any() and Adapter(64).bottleneck == 4
    module = adapter()
    y = module(x)
    torch.testing.assert_close(adapter("parallel").delta(x).shape, y.shape)
    assert disable_lora(module) == 0 and torch.equal(module(x), y)  # the LoRA switches leave it
    module.disable()
    assert torch.equal(module(x), x)
    module.enable()
    torch.testing.assert_close(copy.deepcopy(module)(x), y)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), y)
    torch.testing.assert_close(module(x.bfloat16()).float(), y, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x), y, rtol=0.05, atol=0.05)
    assert repr(module).startswith("Adapter(\n  dim=12, bottleneck=5, activation=gelu, kind=houlsby")
    fresh = adapter()
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(fresh(x), y)


def direct(fusion, x):
    """The definition: a key and a value of each adapter's delta."""
    deltas = torch.stack([a.delta(x) for a in fusion.adapters], dim=-2)
    scores = (fusion.query(x).unsqueeze(-2) * fusion.key(deltas)).sum(-1)
    return x + (scores.softmax(-1).unsqueeze(-1) * fusion.value(deltas)).sum(-2)


def fused(dtype=torch.float32, **options):
    adapters = [adapter(dtype=dtype, bottleneck=n, activation=a, scale=s) for n, a, s in ((3, "relu", 1.0), (5, "gelu", 0.5), (4, "tanh", 2.0))]  # fmt: skip
    fusion = AdapterFusion(12, adapters, **options)
    nn.init.normal_(fusion.value.weight, std=0.3)
    return fusion


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fusion_parity(dtype):
    fusion = fused(dtype, freeze_adapters=False)
    x = torch.randn(3, 4, 12, dtype=torch.float64).to(dtype)
    results = []
    for kind in (None, dtype, torch.float64):
        twin = copy.deepcopy(fusion).to(kind or dtype)
        for each in twin.adapters:
            each.backend = "eager"
        h = x.detach().to(kind or dtype).requires_grad_()
        y = twin(h) if kind is None else direct(twin, h)
        torch.manual_seed(2)
        y.backward(torch.randn(y.shape, dtype=torch.float64).to(dtype).to(y.dtype))
        results.append({"y": y.detach(), "x": h.grad} | {name: p.grad for name, p in twin.named_parameters()})
    testing.assert_all_within_budget(*results, dtype)


def test_fusion_stages_and_states():
    fusion = fused()
    assert {name for name, p in fusion.named_parameters() if p.requires_grad} == {
        "query.weight",
        "key.weight",
        "value.weight",
    }
    fresh = AdapterFusion(12, [Adapter(12, 4), Adapter(12, 4)])
    x = torch.randn(5, 12)
    assert torch.equal(fresh(x), x) and torch.equal(fresh.value.weight, torch.eye(12))
    y = fusion(x)
    torch.testing.assert_close(copy.deepcopy(fusion)(x), y)
    torch.testing.assert_close(torch.compile(fusion, fullgraph=True, backend="aot_eager")(x), y)
    optimizer = torch.optim.Adam([p for p in fusion.parameters() if p.requires_grad], lr=0.05)
    before = copy.deepcopy(fusion.adapters.state_dict())
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (fusion(x) - x.flip(0)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in fusion.adapters.state_dict().items())


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Adapter(0), ValueError, "Adapter: dim must be at least 1"),
        (lambda: Adapter(8, 2.5), TypeError, "bottleneck must be an integer"),
        (lambda: Adapter(8, 2, "swish"), ValueError, "activation must be one of gelu, relu, silu, tanh, sigmoid"),
        (lambda: Adapter(8, 2, kind="serial"), ValueError, "kind must be one of houlsby, pfeiffer, parallel"),
        (lambda: Adapter(8, 2, backend="gpu"), ValueError, "backend must be one of"),
        (lambda: AdapterFusion(8, [Adapter(8)]), ValueError, "adapters must be two or more, got 1"),
        (lambda: AdapterFusion(8, [Adapter(8), Adapter(6)]), ValueError, "adapters must be of dim 8, got 6"),
        (
            lambda: AdapterFusion(8, [Adapter(8), nn.Linear(8, 8)]),
            TypeError,
            "adapters must be Adapter modules, got Linear",
        ),
        (lambda: Adapter(8)(torch.ones(2, 7)), ValueError, "x must have shape .* 8"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
