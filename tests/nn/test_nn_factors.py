"""Layers × factors: a new factors class by the checklist of fastpeft/nn/factors/base.py, options, refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import qlora_cases
from fastpeft import dispatch
from fastpeft.nn import LoRALayer, LoRALinear, LoRAModule, QLoRALinear
from nn_cases import linear, trained


class Gained(LoRAModule):
    """The smallest factors: one trained gain for each rank, ``gain`` at first."""

    OWN = ("gain",)

    def _adapt(self, config, device, dtype, gain=1.0):
        super()._adapt(config, device, dtype)
        self.first = gain
        self.gains = nn.Parameter(torch.empty(config.rank, 1, device=device, dtype=dtype))

    def _reset(self, weight):
        super()._reset(weight)
        nn.init.constant_(self.gains, self.first)

    def factors(self):
        a, b = super().factors()
        return a * self.gains, b


class GainedLayer(Gained, LoRALayer):
    pass


class GainedLinear(Gained, LoRALinear):
    pass


class GainedQLinear(Gained, QLoRALinear):
    pass


def served(backend):
    missing = dispatch.unmet("lora_linear_fwd", backend, "cpu", torch.float32)
    return pytest.param(backend, marks=[pytest.mark.skip(reason=missing)] if missing else [])


def make(kind, backend, **options):
    options = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "backend": backend, "gain": 2.0, "bias": True, **options}
    module = kind(32, 24, **options) if kind is GainedLayer else kind(linear(), **options)
    nn.init.normal_(module.lora_B)
    return module


@pytest.mark.parametrize("backend", [served("eager"), served("cpp"), served("triton")])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("kind", [GainedLayer, GainedLinear, GainedQLinear])
def test_new_factors_serve_every_layer(kind, layout, backend):
    module = make(kind, backend, layout=layout)
    x = torch.randn(3, 32)
    a, b = (module.lora_A.t(), module.lora_B.t()) if layout == "in_out" else (module.lora_A, module.lora_B)
    update = (x @ (a * 2.0).t() @ b.t() + module.lora_bias) * 2.0
    if kind is not GainedLayer:
        module.disable()
        update = update + module(x)
        module.enable()
    y = module(x)
    torch.testing.assert_close(y, update)
    y.square().sum().backward()
    assert module.gains.grad.abs().sum() > 0
    assert {"lora_A", "lora_B", "lora_bias", "gains"} <= module.state_dict().keys()
    assert "factors" not in "".join(module.state_dict())
    torch.testing.assert_close(copy.deepcopy(module)(x), y)


@pytest.mark.parametrize("backend", [served("eager"), served("cpp")])
def test_new_factors_inherit_the_merge(backend):
    module = make(GainedLinear, backend)
    x = torch.randn(3, 32)
    y, before = module(x), module.weight.clone()
    module.merge()
    torch.testing.assert_close(module(x), y)
    module.unmerge()
    assert torch.equal(module.weight, before)
    torch.testing.assert_close(make(GainedQLinear, backend).to_linear(torch.float32).weight.shape, (24, 32))


def test_every_step_left_out_is_loud():
    class WithoutOption(Gained):
        OWN = ()

    class Layer(WithoutOption, LoRALayer):
        pass

    with pytest.raises(TypeError, match="Layer: gain must be a known option"):
        Layer(8, 8, gain=2.0)

    class WithoutKeyword(LoRAModule):
        OWN = ("gain",)

    class Layer2(WithoutKeyword, LoRALayer):
        pass

    with pytest.raises(TypeError, match="gain"):
        Layer2(8, 8, gain=2.0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LoRALinear.from_linear(linear(), r=8), r"LoRALinear: r must be a known option.*did you mean rank\?"),
        (lambda: LoRALinear(linear(), lora_alpha=8), r"lora_alpha must be .*did you mean alpha\?"),
        (lambda: LoRALinear(32, 24, lora_dropout=0.1), r"lora_dropout must be .*did you mean dropout\?"),
        (lambda: LoRALinear(32, 24, adapter_dtyp=None), r"did you mean adapter_dtype\?"),
        (lambda: LoRALinear(linear(), base_bias=False), "LoRALinear: base_bias must be a known option"),
        (lambda: LoRALayer(8, 8, drop_out=0.1), r"LoRALayer: drop_out must .* did you mean dropout\?"),
        (lambda: LoRALayer(8, 8, zzz=1), "these are known: alpha, backend, bias"),
        (
            lambda: QLoRALinear.from_linear(linear(), quant="nf4"),
            r"QLoRALinear: quant must .* did you mean quant_type\?",
        ),
        (lambda: GainedLinear(linear(), gains=1.0), r"GainedLinear: gains must .*did you mean gain\?"),
        (lambda: LoRALinear(linear(), freeze_base=1), "LoRALinear: freeze_base must be True or False, got int"),
        (lambda: LoRALinear(8, 8, base_bias="no"), "LoRALinear: base_bias must be True or False, got str"),
        (lambda: QLoRALinear(64, 8, base_bias=1), "QLoRALinear: base_bias must be True or False, got int"),
        (lambda: LoRALinear(linear(), use_rslora="yes"), "use_rslora must be True or False, got str"),
    ],
)
def test_unknown_options(make, message):
    with pytest.raises(TypeError, match=message):
        make()


COMPUTED = {
    "parametrize": lambda m: nn.utils.parametrize.register_parametrization(m, "weight", nn.Identity()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "bias": lambda m: nn.utils.parametrize.register_parametrization(m, "bias", nn.Identity()),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_merge_into_a_computed_weight_is_refused(how):
    """What is written into a weight that torch computes anew at the next access would be lost, and the adapter with it."""
    module = trained()
    COMPUTED[how](module)
    x = torch.randn(3, 32)
    y, before = module(x), {name: value.clone() for name, value in module.state_dict().items()}
    name = "bias" if how == "bias" else "weight"
    with pytest.raises(ValueError, match=f"LoRALinear: {name} must be a plain Parameter for merge"):
        module.merge()
    assert not module.merged
    after = module.state_dict()
    # spectral_norm's power iteration moves its buffers at every access in training.
    assert all(torch.equal(after[key], before[key]) for key in before if "_u" not in key and "_v" not in key)
    if how != "spectral_norm":
        torch.testing.assert_close(module(x), y)


def test_merge_into_a_computed_4bit_weight_is_refused():
    module = qlora_cases.trained()
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity(), unsafe=True)
    with pytest.raises(ValueError, match="weight must be a plain Parameter for merge"):
        module.merge()


def test_unmerge_and_reset_into_a_computed_weight_are_refused():
    module = trained(bias=False)
    module.merge()
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    with pytest.raises(ValueError, match="weight must be a plain Parameter for unmerge"):
        module.unmerge()
    module = LoRALinear(linear(), 4, init="pissa")
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    with pytest.raises(ValueError, match="weight must be a plain Parameter for reset_parameters"):
        module.reset_parameters()


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_out_proj_of_attention_is_refused(kind):
    """torch reads that weight past the module: an adapter there would train nothing and say nothing."""
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match=r"nn\.MultiheadAttention reads out_proj\.weight"):
        kind.from_linear(attention.out_proj)
    assert attention.out_proj.weight.requires_grad
