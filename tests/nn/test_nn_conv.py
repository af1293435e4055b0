"""LoRAConv1d/2d/3d: torch's own layer at init, merged and disabled; options, states, refusals, PEFT's numbers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastpeft
from fastpeft import LoRAConv1d, LoRAConv2d, LoRAConv3d
from fastpeft.nn import LoRAModule

KINDS = {LoRAConv1d: nn.Conv1d, LoRAConv2d: nn.Conv2d, LoRAConv3d: nn.Conv3d}
BASES = [
    pytest.param(LoRAConv1d, (4, 6, 3), {"padding": "same"}, (8,), id="1d"),
    pytest.param(LoRAConv2d, (4, 6, (3, 2)), {"stride": (2, 1), "padding": (1, 0), "groups": 2}, (6, 5), id="2d"),
    pytest.param(
        LoRAConv2d, (4, 6, 3), {"padding": 1, "padding_mode": "circular", "bias": False}, (6, 5), id="circular"
    ),
    pytest.param(LoRAConv3d, (4, 6, (1, 3, 2)), {"dilation": (1, 2, 1)}, (2, 6, 5), id="3d"),
]


def trained(kind, sizes, options, dtype=torch.float32, **own):
    module = kind.from_conv(KINDS[kind](*sizes, **options, dtype=dtype), **{"rank": 2, "lora_bias": True, **own})
    nn.init.normal_(module.lora_B)
    nn.init.normal_(module.lora_bias)
    return module


@pytest.mark.parametrize(("kind", "sizes", "options", "size"), BASES)
def test_torchs_layer(kind, sizes, options, size):
    """At init, disabled and merged, in both memory formats; in training only the adapter gets gradients."""
    base = KINDS[kind](*sizes, **options)
    module, x = kind.from_conv(copy.deepcopy(base)), torch.randn(2, 4, *size)
    torch.testing.assert_close(module.eval()(x), base(x))
    assert (module.rank, module.alpha, module.dropout_probability, module.scaling) == (16, 32.0, 0.05, 2.0)
    module = trained(kind, sizes, options, dropout=0.0)
    y = module(x)
    assert not torch.allclose(y, nn.Module.__call__(module.to_conv(), x) - 1)
    torch.testing.assert_close(y, module.to_conv()(x))
    torch.testing.assert_close(y[1], module(x[1]))
    y.square().sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == {"lora_A", "lora_B", "lora_bias"}
    module.disable()
    assert torch.equal(module(x), KINDS[kind]._conv_forward(module, x, module.weight, module.bias))


@pytest.mark.parametrize("backup", [True, False])
@pytest.mark.parametrize(("kind", "sizes", "options", "size"), BASES)
def test_merge(kind, sizes, options, size, backup):
    module, x = trained(kind, sizes, options).eval(), torch.randn(2, 4, *size)
    before, y = copy.deepcopy(module.state_dict()), module(x)
    delta = module.delta_weight()
    report = module.merge(keep_backup=backup)
    assert module.merged and report.dtype == torch.float32 and report.relative_error_of_update < 1e-5
    torch.testing.assert_close(module.weight, before["weight"] + delta)
    torch.testing.assert_close(module(x), y)
    module.unmerge()
    after = module.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        (torch.testing.assert_close if not backup else _same)(after[name], value)


def _same(first, second):
    assert torch.equal(first, second)


def test_from_sizes():
    """S4's LoRAConv2d: positions, and torch's meaning of torch's names."""
    module = LoRAConv2d(3, 64, 3, 4, 2, 1)
    assert (module.stride, module.padding, module.rank, module.scaling) == ((2, 2), (1, 1), 4, 0.01)
    assert module.lora_A.shape == (4, 27) and module.lora_B.shape == (64, 4)
    assert (module.init, module.dropout_probability, module.lora_bias) == ("randn", 0.0, None)
    assert module.bias is not None and not module.weight.requires_grad
    assert 0.7 < module.lora_A.std() < 1.3 and not module.lora_B.any()
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(module(x), torch.conv2d(x, module.weight, module.bias, 2, 1))
    other = LoRAConv2d(
        in_channels=4, out_channels=6, kernel_size=(1, 3), rank=2, alpha=4, groups=2, bias=False, lora_bias=True,
        lora_dropout=0.25, padding="same", padding_mode="reflect", dtype=torch.float64, backend="eager",
    )  # fmt: skip
    assert other.bias is None and other.lora_bias is not None and other.dropout_probability == 0.25
    assert (other.scaling, other.init, other.lora_A.shape) == (2.0, "kaiming", (2, 6))
    assert other(torch.randn(1, 4, 5, 5, dtype=torch.float64)).shape == (1, 6, 5, 5)
    assert LoRAConv2d(3, 4, 3, layout="out_in").rank == 8
    assert LoRAConv2d.from_conv(nn.Conv2d(3, 4, 3), layout="in_out").lora_A.shape == (16, 27)


def test_states():
    module, x = trained(LoRAConv2d, (4, 6, 3), {}).eval(), torch.randn(2, 4, 5, 5)
    y = module(x)
    assert list(module.state_dict()) == ["weight", "bias", "lora_A", "lora_B", "lora_bias"]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), y)
    fresh = LoRAConv2d(nn.Conv2d(4, 6, 3), rank=2, bias=True).eval()
    fresh.load_state_dict(module.state_dict())
    fresh.scaling = module.scaling
    assert torch.equal(fresh(x), y)
    base = nn.Conv2d(4, 6, 3)
    missing, unexpected = fresh.load_state_dict(base.state_dict(), strict=False)
    assert set(missing) == {"lora_A", "lora_B", "lora_bias"} and not unexpected
    with fastpeft.lora_disabled(fresh):
        assert torch.equal(fresh(x), base(x))
    assert "kernel_size=(3, 3)" in repr(fresh) and "rank=2" in repr(fresh)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_init_from_weight(init):
    """The part that pissa and olora take out of W, channels-last too, is in B A."""
    base = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    x, y = torch.randn(2, 4, 5, 5), None
    y = base(x)
    module = LoRAConv2d.from_conv(base, rank=2, init=init, dropout=0.0)
    assert module.lora_B.abs().sum() > 0
    torch.testing.assert_close(module(x), y)


def test_training_in_low_precision():
    """fp32 adapters on a bf16 base under autocast and without, compiled, with dropout; loss falls."""
    module = trained(LoRAConv2d, (4, 6, 3), {"padding": 1}, torch.bfloat16, dropout=0.1)
    x, target = torch.randn(8, 4, 6, 6).bfloat16(), torch.randn(8, 6, 6, 6)
    assert module.lora_A.dtype == torch.float32 and module(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x.float()).dtype == torch.bfloat16
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = (compiled(x).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.9 * losses[0]


def test_factors():
    """A variant's factors serve a convolution as they serve a linear layer."""

    class Doubled(LoRAModule):
        def factors(self):
            a, b = super().factors()
            return a * 2.0, b

    class DoubledConv(Doubled, LoRAConv2d):
        pass

    base, x = nn.Conv2d(4, 6, 3).double(), torch.randn(2, 4, 5, 5).double()
    twice, once = (kind.from_conv(copy.deepcopy(base), rank=2, dropout=0.0) for kind in (DoubledConv, LoRAConv2d))
    nn.init.normal_(once.lora_B)
    twice.load_state_dict(once.state_dict())
    torch.testing.assert_close(twice(x) - base(x), 2 * (once(x) - base(x)))


def hooked():
    conv = nn.Conv2d(4, 6, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nn.ConvTranspose2d(4, 6, 3), TypeError, "original_layer must be an nn.Conv2d with its own forward"),
        (lambda: nn.Conv1d(4, 6, 3), TypeError, "original_layer must be an nn.Conv2d with its own forward, got Conv1d"),
        (lambda: Own(4, 6, 3), TypeError, "original_layer must be an nn.Conv2d with its own forward, got Own"),
        (lambda: nn.LazyConv2d(6, 3), ValueError, "original_layer must hold initialised parameters"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), ValueError, "original_layer must hold"),
        (hooked, ValueError, "original_layer must have no hooks, which a replacement would not call, got 1"),
    ],
    ids=["transposed", "1d", "own", "lazy", "weight_norm", "hooks"],
)
def test_refused(make, error, text):
    layer = make()
    with pytest.raises(error, match=f"^LoRAConv2d: {text}"):
        LoRAConv2d.from_conv(layer)
    assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"r": 4}, TypeError, "r must be a known option, got an unknown one: did you mean rank"),
        ({"lora_alpha": 4}, TypeError, "lora_alpha must be a known option, got an unknown one: did you mean alpha"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"path": "fold"}, ValueError, "path must be one of auto, accumulate, merged, got 'fold'"),
        ({"dropout": 0.1, "lora_dropout": 0.1}, ValueError, "dropout must be given under one name"),
        ({"bias": True, "lora_bias": True}, ValueError, "bias must be given under one name"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=f"^LoRAConv2d: {text}"):
        LoRAConv2d(nn.Conv2d(4, 6, 3), **options)
    with pytest.raises(ValueError, match=r"^LoRAConv2d: base must be linear for to_linear\(\)"):
        LoRAConv2d(4, 6, 3).to_linear()


def test_peft():
    """PEFT's layer where it is right: no dilation, no groups, zeros."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    base = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    holder = nn.Sequential(copy.deepcopy(base))
    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(holder, config)
    module = LoRAConv2d.from_conv(base, rank=2, alpha=4, dropout=0.0)
    given = dict(theirs.named_parameters())
    ours = {"A": module.lora_A, "B": module.lora_B}
    with torch.no_grad():
        for name, parameter in given.items():
            if "lora_" in name:
                ours[name.split("lora_")[1][0]].copy_(parameter.flatten(1))
    x = torch.randn(2, 4, 7, 7)
    y, want = module(x), theirs(x)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    for name, parameter in given.items():
        if "lora_" in name:
            torch.testing.assert_close(ours[name.split("lora_")[1][0]].grad, parameter.grad.flatten(1))
