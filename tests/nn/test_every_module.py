"""What holds for every module that computes: one table, so that a new one is asked the same questions."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from every_module import NAMES, build, call, missing
from fastpeft import RankAllocator
from fastpeft.nn import (
    AdaLoRALinear,
    Adapter,
    AdapterFusion,
    LoRALinear,
    LoRAParametrization,
    add_parametrization,
)
from fastpeft.ops import _derivatives
from fastpeft.ops._recurrent import recurrent

NOT_TORCHS = [name for name in NAMES if name != "LoRAParametrization"]


def test_the_table_has_all():
    assert not missing()


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name):
    """The gradient of a gradient penalty by a loss that is linear in y, whose dy needs none, against differences."""
    module, inputs = build(name, torch.float64, backend="eager")
    x = inputs[0].clone().requires_grad_()
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]

    def penalty(**graph):
        loss = sum(y.sum() + y.square().sum() for y in call(module.eval(), inputs, x))
        found = torch.autograd.grad(loss, leaves, allow_unused=True, **graph)
        return sum(g.square().sum() for g in found if g is not None)

    found = torch.autograd.grad(penalty(create_graph=True), leaves, allow_unused=True)
    step = [torch.randn_like(leaf) for leaf in leaves]
    for child in module.modules():  # a masked element is no variable
        for key in ("A", "B"):
            if hasattr(child, f"mask_{key}"):
                where = next(i for i, leaf in enumerate(leaves) if leaf is getattr(child, f"lora_{key}"))
                step[where] *= getattr(child, f"mask_{key}")
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for leaf, part in zip(leaves, step, strict=True):
                leaf.add_(part, alpha=sign * 1e-6)
        values.append(penalty().item())
    expected = (values[0] - values[1]) / 2e-6
    along = sum((g * part).sum().item() for g, part in zip(found, step, strict=True) if g is not None)
    assert along == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("mode", ["GRU", "RNN_TANH", "RNN_RELU"])
def test_the_loop_of_a_recurrent_layer(mode):
    """gradgradcheck with each input frozen in turn, with an adapter and without; third derivatives; batched ones."""
    rows = 12 if mode == "GRU" else 4
    for shapes in ([(2, 4), (rows, 2)], []):
        given = [torch.randn(*shape).double() for shape in ((3, 2, rows), (2, 4), (rows, 4), (rows,), *shapes)]

        def run(*given, shapes=shapes):
            return recurrent(*given, *(() if shapes else (None, None)), mode)

        for frozen in range(-1, len(given)):
            leaves = [t.requires_grad_(i != frozen) for i, t in enumerate(given)]
            assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
            assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
        gates = given[0].detach()
        rest = [t.detach() for t in given[1:]]

        def loss(x, rest=rest, run=run):
            return run(x, *rest).sin().sum()

        hessians = [torch.autograd.functional.hessian(loss, gates, vectorize=v) for v in (True, False)]
        torch.testing.assert_close(*hessians)


@pytest.mark.parametrize("name", NOT_TORCHS)
def test_saved_tensors_with_other_strides(name):
    """What saved-tensor hooks bring back need not lie as it did. (torch's own LSTM misreads what its hooks bring.)"""
    if name == "LoRALSTM":
        return
    found = []
    for spread in (False, True):
        module, inputs = build(name, dropout=0.3)
        x = inputs[0].clone().requires_grad_()

        def unpack(t, spread=spread):
            return torch.stack([t, t], -1)[..., 0] if spread and t.dim() else t

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            sum(y.square().sum() for y in call(module.train(), inputs, x)).backward()
        found.append([x.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found)


# A base that gradients of the factors before it go through is read in backward, ours as torch's.
READ = ("LoRARNN", "LoRAGRU", "LoRALSTM", "LoRAMultiheadAttention", "LoRAMultiheadAttention apart", "AdapterFusion")


@pytest.mark.parametrize("name", [name for name in NOT_TORCHS if name not in READ])
def test_a_base_that_no_gradient_reads(name):
    """It may be of inference mode, or written after the forward."""
    module, inputs = build(name)
    frozen = {key: p for key, p in module.named_parameters() if not p.requires_grad}
    y = sum(y.square().sum() for y in call(module, inputs, inputs[0]))
    with torch.no_grad():
        for parameter in frozen.values():
            parameter.add_(1.0)
    y.backward()
    for key in frozen:
        with torch.inference_mode():
            setattr(module, key, nn.Parameter(torch.ones_like(frozen[key]), requires_grad=False))
    sum(y.square().sum() for y in call(module, inputs, inputs[0])).backward()


@pytest.mark.parametrize("name", NOT_TORCHS)
def test_transforms(name):
    """torch.func.grad over functional_call, and a dual number."""
    module, inputs = build(name)
    module.eval()
    parameters = {key: p.detach() for key, p in module.named_parameters()}

    def loss(x):
        def run(*given):
            return torch.func.functional_call(module, parameters, given)

        return sum(y.square().sum() for y in call(run, inputs, x))

    x = inputs[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(inputs[0]), expected, rtol=1e-4, atol=1e-4)
    if name == "LoRALSTM":  # oneDNN's has no forward mode
        return
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0])))).tangent
    torch.testing.assert_close(tangent, expected.sum(), rtol=1e-4, atol=1e-3)


def test_a_trace_reads_its_task_ids():
    """torch.jit.trace keeps no segments of the ids that it was shown."""
    module, (x, ids) = build("ConditionalLoRALinear")
    with torch.no_grad():
        traced = torch.jit.trace(module.eval(), (x, ids), check_trace=False)
        for other in ([1, 1, 0], [-1, 0, 1]):
            torch.testing.assert_close(traced(x, torch.tensor(other)), module(x, torch.tensor(other)))


def test_strict_export_in_a_fresh_process():
    """The references are imported while torch.compile traces: all that a call needs, not the first alone."""
    module, inputs = build("LoRALayer")
    _derivatives._references.clear()
    program = torch.export.export(module.eval(), inputs, strict=True)
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def nested(x):
    return torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged)


BAD = {
    "int64": lambda x: x.to(torch.int64),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": nested,
    "list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("name", NOT_TORCHS)
def test_inputs_of_another_kind(name):
    module, inputs = build(name)
    for kind, turn in BAD.items():
        error = (TypeError, ValueError) if kind == "nested" else TypeError
        with pytest.raises(error, match=r"^\w+: \w+ must ") as caught:
            call(module.eval(), inputs, turn(inputs[0]))
        assert not str(caught.value).startswith("_"), kind


@pytest.mark.parametrize("name", [name for name in NOT_TORCHS if name != "AdapterFusion"])
def test_a_backend_that_cannot_serve(name):
    module, inputs = build(name, backend="cuda")
    with pytest.raises(ValueError, match=r"backend must be .*'cuda'"):
        call(module.train(), inputs, inputs[0])


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("name", [name for name in NOT_TORCHS if "Layer" not in name and "Adapter" not in name])
def test_a_computed_base_is_not_written(name):
    """Weights and biases alike, one of several too: merge, its undoing, what is made plain, and what init takes out."""
    keys = [key for key, p in build(name)[0].named_parameters() if not p.requires_grad]
    assert keys
    for key in keys:
        module, _ = build(name)
        owner, _, leaf = key.rpartition(".")
        parametrize.register_parametrization(module.get_submodule(owner), leaf, Halved())
        before = {k: v.clone() for k, v in module.state_dict().items()}
        condition = (1,) if "Conditional" in name else (torch.ones(7),) if "Hyper" in name else ()
        for child in module.modules():
            if hasattr(child, "init"):
                child.init = "pissa"
        calls = [functools.partial(module.merge, *condition, keep_backup=backup) for backup in (True, False)]
        plain = [kind for kind in ("linear", "cell", "rnn", "attention", "conv") if hasattr(module, f"to_{kind}")]
        if not condition and plain != ["linear"]:
            calls.append(getattr(module, f"to_{plain[0]}"))
        if not condition:
            calls.append(module.reset_parameters)
        for each in calls:
            with pytest.raises(ValueError, match=" must "):
                each()
            assert not module.merged
            for k, v in module.state_dict().items():
                assert torch.equal(v, before[k]), (key, k)


def test_unmerge_of_some_changes_nothing():
    module, _ = build("LoRAGRUCell")
    module.lora_ih.merge()
    with pytest.raises(ValueError, match="be merged for unmerge"):
        module.unmerge()
    assert module.lora_ih.merged


@pytest.mark.parametrize("name", NAMES)
def test_copies(name):
    module, inputs = build(name)
    expected = call(module.eval(), inputs, inputs[0])
    twins = [copy.deepcopy(module)]
    if name in NOT_TORCHS:  # torch's parametrized classes are made at run time
        twins.append(pickle.loads(pickle.dumps(module)))
    for twin in twins:
        torch.testing.assert_close(call(twin, inputs, inputs[0]), expected, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1.0)
    torch.testing.assert_close(call(module, inputs, inputs[0]), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adapter(8, 4, activate="relu"), r"Adapter: activate must .*did you mean activation\?"),
        (lambda: AdapterFusion(8, [Adapter(8)] * 2, freeze=True), r"AdapterFusion: freeze must .*freeze_adapters"),
        (lambda: LoRAParametrization(8, 8, r=2), r"LoRAParametrization: r must .*did you mean rank\?"),
        (lambda: add_parametrization(nn.Linear(8, 8), lora_alpha=2), r"add_parametrization: lora_alpha .* alpha\?"),
        (lambda: RankAllocator([AdaLoRALinear(8, 8)], total_steps=3), r"RankAllocator: .*did you mean total_step\?"),
        (lambda: LoRALinear(8, 8, dtype=torch.int32), "LoRALinear: dtype must be a floating point dtype"),
        (lambda: Adapter(8, dtype=torch.int32), "Adapter: dtype must be a floating point dtype"),
    ],
)
def test_options(make, message):
    with pytest.raises(TypeError, match=message):
        make()
