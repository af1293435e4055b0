"""LoRALayer and LoRALinear: conventions, parity, freezing, initialisation, training, graphs, errors."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qlora_cases
from fastpeft import testing
from fastpeft.nn import LoRALayer, LoRALinear
from fastpeft.nn.init import SCHEMES
from fastpeft.ops._calls import draw_seed
from fastpeft.reference.dropout import keep_factor, keep_mask
from nn_cases import linear, trained


def definition(module, x, dtype, mask=1.0):
    a, b = module.factors()
    x, w, a, b = (t.detach().to(dtype) for t in (x, module.weight, a, b))
    y = (x * mask) @ a.t() @ b.t()
    y = y + module.lora_bias.detach().to(dtype) if module.lora_bias is not None else y
    return x @ w.t() + (0 if module.bias is None else module.bias.detach().to(dtype)) + y * module.scaling


@pytest.mark.parametrize(
    "layer, shapes, scaling, dropout, init",
    [
        (LoRALayer(768, 512, 8, 16.0, 0.1), ((8, 768), (512, 8)), 2.0, 0.1, "kaiming"),
        (LoRALayer(input_dimension=768, output_dimension=512), ((8, 768), (512, 8)), 2.0, 0.1, "kaiming"),
        (LoRALayer(input_dim=768, output_dim=512, rank=8), ((8, 768), (512, 8)), 2.0, 0.1, "kaiming"),
        (LoRALayer(in_features=768, out_features=512), ((768, 4), (4, 512)), 0.01, 0.0, "randn"),
        (LoRALayer(768, 512, layout="in_out"), ((768, 4), (4, 512)), 0.01, 0.0, "randn"),
        (LoRALayer(768, 512, layout="in_out", alpha=8), ((768, 4), (4, 512)), 2.0, 0.0, "kaiming"),
        (LoRALayer(768, 512, rank=16, alpha=8, use_rslora=True), ((16, 768), (512, 16)), 2.0, 0.1, "kaiming"),
        (LoRALayer(768, 512, scaling=0.5), ((8, 768), (512, 8)), 0.5, 0.1, "kaiming"),
        (LoRALinear(linear(768, 512), 4, 8, 0.2), ((4, 768), (512, 4)), 2.0, 0.2, "kaiming"),
        (LoRALinear(original_layer=linear(768, 512), rank=4), ((4, 768), (512, 4)), 4.0, 0.1, "kaiming"),
        (LoRALinear(768, 512, rank=4), ((768, 4), (4, 512)), 0.01, 0.0, "randn"),
        (LoRALinear(in_features=768, out_features=512), ((768, 4), (4, 512)), 0.01, 0.0, "randn"),
        (LoRALinear(768, 512, 4, layout="out_in"), ((4, 768), (512, 4)), 4.0, 0.1, "kaiming"),
        (LoRALinear.from_linear(linear(768, 512)), ((16, 768), (512, 16)), 2.0, 0.05, "kaiming"),
        (LoRALinear.from_linear(linear(768, 512), scaling=0.5), ((16, 768), (512, 16)), 0.5, 0.05, "kaiming"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_conventions(layer, shapes, scaling, dropout, init):
    """The parts of a convention come together: never N(0, 1) with α/r by default."""
    assert (tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)) == shapes
    assert (layer.scaling, layer.dropout_probability, layer.init) == (scaling, dropout, init)
    assert not layer.lora_B.any() and layer.lora_bias is None
    std = {"randn": 1.0, "kaiming": (3 * 768) ** -0.5}[init]
    assert layer.lora_A.std().item() == pytest.approx(std, rel=0.05)


def test_counts_and_freezing():
    module = LoRALinear(768, 768, rank=4)
    assert sum(p.numel() for p in module.parameters()) == 596_736
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    base = linear().eval()
    module = LoRALinear.from_linear(base)
    assert module.weight is base.weight and module.bias is base.bias and not base.weight.requires_grad
    assert not module.training and (module.in_features, module.out_features) == (32, 24)
    assert LoRALinear(linear(), freeze_base=False).weight.requires_grad
    assert LoRALinear(8, 6, base_bias=False).bias is None


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parity(dtype, p, layout):
    module = trained(p, dtype=dtype, layout=layout)
    assert module.lora_A.dtype == torch.float32
    x = torch.randn(2, 7, 32).to(dtype)
    torch.manual_seed(4)
    seed = draw_seed("cpu")
    mask = keep_mask(seed, 14, 32, p, "cpu").view(x.shape) * keep_factor(p) if p else torch.ones(())
    torch.manual_seed(4)
    y = module(x)
    assert y.dtype == dtype
    gold = definition(module, x, torch.float64, mask.double())
    testing.assert_within_budget(y, definition(module, x, dtype, mask.to(dtype)), gold, dtype)
    module.eval()
    torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_layer_plus_base_is_linear(layout):
    """LoRALayer beside a base is LoRALinear, value and gradients."""
    module = trained(layout=layout)
    layer = LoRALayer(32, 24, 4, 8.0, 0.0, True, layout=layout)
    layer.load_state_dict({name: value for name, value in module.state_dict().items() if name.startswith("lora_")})
    x = torch.randn(5, 32)
    y = nn.functional.linear(x, module.weight, module.bias) + layer(x)
    torch.testing.assert_close(y, module(x))
    y.square().sum().backward()
    module(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, getattr(module, name).grad)


@pytest.mark.parametrize("init", [s.replace("<n>", "8") for s in SCHEMES])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_init_keeps_the_output(init, layout):
    base = linear(64, 48)
    before = copy.deepcopy(base)
    module = LoRALinear(base, 4, 8, 0.0, init=init, layout=layout)
    assert module.lora_A.any() and module.lora_B.any() == (init in ("orthogonal", "olora") or "pissa" in init)
    assert torch.equal(module.weight, before.weight) == (not module.lora_B.any() or init == "orthogonal")
    x = torch.randn(5, 64)
    torch.testing.assert_close(module(x), before(x), rtol=1e-4, atol=1e-5)


def test_pissa_takes_the_leading_part():
    base = linear(64, 48)
    u, sigma, vh = torch.linalg.svd(base.weight.detach(), full_matrices=False)
    module = LoRALinear(base, 4, 8, 0.0, init="pissa")
    torch.testing.assert_close(module.delta_weight(), u[:, :4] * sigma[:4] @ vh[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(module.weight)[0], sigma[4], rtol=1e-4, atol=1e-5)


def test_repr():
    module = trained(0.1)
    assert repr(module) == (
        "LoRALinear(in_features=32, out_features=24, bias=True, rank=4, alpha=8, scaling=2, dropout=0.1, "
        "init=kaiming, lora_bias=True, layout=out_in)"
    )
    assert repr(LoRALayer(in_features=8, out_features=6)) == (
        "LoRALayer(in_features=8, out_features=6, rank=4, scaling=0.01, dropout=0, init=randn, layout=in_out)"
    )
    module.merge()
    assert repr(module).endswith("layout=out_in, merged)")
    module.disable()
    assert repr(module).endswith("layout=out_in, disabled)")


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_training(layout):
    """The loss falls, and only the factors move."""
    module = LoRALinear(linear(), 4, 8.0, 0.1, bias=True, layout=layout)
    frozen = copy.deepcopy(module.state_dict())
    torch.manual_seed(1)
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
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, frozen[name])}
    assert moved == {"lora_A", "lora_B", "lora_bias"} and module.weight.grad is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    """The recomputed forward draws the same mask."""
    module = trained(0.5)
    x = torch.randn(6, 32, requires_grad=True)
    results = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        module.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        results.append([x.grad] + [p.grad for p in module.parameters() if p.requires_grad])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("kind", [LoRALinear, LoRALayer])
def test_autocast(kind):
    module = trained() if kind is LoRALinear else LoRALayer(32, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(torch.randn(3, 32))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert module.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("kind", [LoRALinear, LoRALayer])
def test_compile(kind, layout):
    module = trained(layout=layout) if kind is LoRALinear else LoRALayer(32, 24, dropout=0.0, layout=layout)
    x = torch.randn(3, 32)
    y = module(x)
    y.sum().backward()
    grad, module.lora_A.grad = module.lora_A.grad, None
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    compiled(x).sum().backward()
    torch.testing.assert_close(module.lora_A.grad, grad)


def test_compile_dropout():
    torch.compile(trained(0.5), fullgraph=True, backend="aot_eager")(torch.randn(3, 32)).sum().backward()


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "lora_bias", "bias"])
@pytest.mark.parametrize("make", [trained, qlora_cases.trained])
def test_parametrized(make, name):
    """A parameter that torch computes at every call, as S2's parametrizations do."""
    module = make()
    x = torch.randn(3, 32)
    y = module(x)
    nn.utils.parametrize.register_parametrization(module, name, nn.Identity())
    torch.testing.assert_close(module(x), y)


def test_meta_device():
    module = LoRALinear(8, 6, device="meta", init="pissa")
    assert all(parameter.is_meta for parameter in module.parameters())
    layer = LoRALayer(8, 6, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert not layer.lora_B.any() and layer.lora_A.isfinite().all()


def test_backend_is_kept():
    module = trained(backend="eager")
    assert "backend=eager" in repr(module)
    x = torch.randn(3, 32)
    gold = definition(module, x, torch.float64)
    testing.assert_within_budget(module(x), definition(module, x, torch.float32), gold, torch.float32)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    layer = linear()
    layer.register_forward_hook(lambda module, args, y: y)
    return layer


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: LoRALinear.from_linear(nn.Conv2d(3, 4, 1)), TypeError, "original_layer must be an nn.Linear.* Conv2d"),
        (lambda: LoRALinear(Doubled(4, 4), 4, 8.0, 0.1), TypeError, "original_layer must be an nn.Linear.* Doubled"),
        (lambda: LoRALinear.from_linear("fc1"), TypeError, "original_layer must be an nn.Linear.* got str"),
        (lambda: LoRALinear(nn.LazyLinear(4)), ValueError, "original_layer must hold initialised parameters"),
        (lambda: LoRALinear(hooked()), ValueError, "original_layer must have no hooks.* got 1"),
        (lambda: LoRALinear(linear(), rank=0), ValueError, "LoRALinear: rank must be at least 1, got 0"),
        (lambda: LoRALinear(linear(), rank=2.5), TypeError, "LoRALinear: rank must be an integer, got float"),
        (lambda: LoRALinear(linear(), alpha="8"), TypeError, "LoRALinear: alpha must be a number, got str"),
        (lambda: LoRALinear(linear(), dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: LoRALinear(linear(), alpha=8, scaling=0.1), ValueError, "alpha must be None where scaling is given"),
        (lambda: LoRALinear(linear(), rank=25, init="pissa"), ValueError, r"rank must be at most min\(in, out\) = 24"),
        (lambda: LoRALinear(linear(), rank=3, init="orthogonal"), ValueError, "rank must be even"),
        (lambda: LoRALinear(linear(), init="xavier"), ValueError, "init must be one of kaiming, .*, got 'xavier'"),
        (lambda: LoRALinear(linear(), layout="oi"), ValueError, "layout must be one of out_in, in_out, got 'oi'"),
        (lambda: LoRALinear(linear(), backend="gpu"), ValueError, "backend must be one of None, cpp"),
        (lambda: LoRALinear(8), TypeError, "out_features must be an integer, got NoneType"),
        (lambda: LoRALinear(linear(), 4, rank=4), TypeError, "rank must be given once"),
        (lambda: LoRALayer(8), TypeError, "output_dimension must be an integer, got NoneType"),
        (lambda: LoRALayer(8, 8, in_features=8), ValueError, "input_dimension must be given under one name"),
        (lambda: LoRALayer(8, 8, init="pissa"), ValueError, "init must be a scheme that needs no base weight"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_refusal_changes_nothing():
    layer = linear()
    with pytest.raises(ValueError, match="rank"):
        LoRALinear(layer, rank=0, init="pissa")
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    before = layer.weight.detach().clone()
    with pytest.raises(torch.linalg.LinAlgError):
        LoRALinear(layer, rank=2, init="pissa")
    assert torch.equal(layer.weight.nan_to_num(), before.nan_to_num()) and layer.weight.requires_grad
