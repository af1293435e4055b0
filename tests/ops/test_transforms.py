"""Our operators and modules inside torch.func, forward mode, torch.jit.trace and torch.export; and what autograd may do
to what they saved."""

import functools
import warnings

import pytest
import torch
from torch.autograd import forward_ad

from cases import normal
from fastpeft import ops
from fastpeft.nn import LoRALayer, LoRALinear, QLoRALinear
from fastpeft.testing import backends

K, N, R = 64, 6, 3


def linear():
    return torch.nn.Linear(K, N)


MODULES = {
    "LoRALinear": lambda p: LoRALinear(linear(), R, dropout=p),
    "LoRALayer": lambda p: LoRALayer(K, N, R, dropout=p),
    "QLoRALinear": lambda p: QLoRALinear(linear(), R, dropout=p),
}


@pytest.fixture(params=MODULES)
def module(request):
    made = MODULES[request.param](0.0)
    torch.nn.init.normal_(made.lora_B)
    return made


def definition(module):
    """The same function of (parameters, x) in torch's own operations."""
    dense = module.dequantize() if isinstance(module, QLoRALinear) else None

    def call(parameters, x):
        a, b = parameters["lora_A"], parameters["lora_B"]
        y = module.scaling * (x @ a.t() @ b.t())
        if isinstance(module, LoRALayer):
            return y
        return y + x @ (parameters["weight"] if dense is None else dense).t() + parameters["bias"]

    return call


def per_sample(call, parameters, x):
    floats = {name: value for name, value in parameters.items() if value.is_floating_point()}
    rest = {name: value for name, value in parameters.items() if not value.is_floating_point()}
    loss = torch.func.grad(lambda p, row: call({**p, **rest}, row[None]).tanh().sum())
    return torch.func.vmap(loss, in_dims=(None, 0))(floats, x)


TRANSFORMS = {
    "per-sample gradients": per_sample,
    "vmap": lambda call, p, x: torch.func.vmap(functools.partial(call, p))(x),
    "jacrev": lambda call, p, x: torch.func.jacrev(functools.partial(call, p))(x),
    "jacfwd": lambda call, p, x: torch.func.jacfwd(functools.partial(call, p))(x),
    "hessian": lambda call, p, x: torch.func.hessian(lambda x: call(p, x).tanh().sum())(x),
    "jvp": lambda call, p, x: torch.func.jvp(functools.partial(call, p), (x,), (x.sin(),)),
    "vjp": lambda call, p, x: torch.func.vjp(functools.partial(call, p), x)[1](torch.ones(*x.shape[:-1], N)),
    "linearize": lambda call, p, x: torch.func.linearize(functools.partial(call, p), x)[1](x.cos()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(module, name):
    x, parameters = normal(2, K), dict(module.named_parameters())
    given = {key: value.detach() for key, value in parameters.items()}
    found = TRANSFORMS[name](functools.partial(torch.func.functional_call, module), given, x)
    expected = TRANSFORMS[name](definition(module), given, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dropout_in_transforms():
    """One mask for the call; under vmap one for each sample, or torch's own word on randomness."""
    module = LoRALinear(linear(), R, dropout=0.5)
    torch.nn.init.normal_(module.lora_B)
    x = normal(K).expand(64, K)
    torch.manual_seed(3)
    _, tangent = torch.func.jvp(module, (x,), (x,))
    torch.manual_seed(3)
    torch.testing.assert_close(tangent, module(x) - module.bias)
    rows = torch.func.vmap(module, randomness="different")(x)
    assert rows.unique(dim=0).shape[0] > 32
    assert torch.func.vmap(module, randomness="same")(x).unique(dim=0).shape[0] == 1
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(module)(x)


def test_forward_mode(module):
    """A dual number's tangent, forward over reverse too, and with the backward alone in forward mode."""
    x, v, call = normal(2, K), normal(2, K), functools.partial(definition(module), dict(module.named_parameters()))
    found = []
    for each in (module, call):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, v)
            found.append(forward_ad.unpack_dual(each(dual)).tangent)
            (gradient,) = torch.autograd.grad(each(dual.requires_grad_()).tanh().sum(), dual)
            found.append(forward_ad.unpack_dual(gradient).tangent)
        leaf = x.clone().requires_grad_()
        y = each(leaf)
        with forward_ad.dual_level():
            (gradient,) = torch.autograd.grad(y, leaf, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))
            found.append(forward_ad.unpack_dual(gradient).tangent)
    torch.testing.assert_close(found[:3], found[3:], rtol=1e-4, atol=1e-5)


def test_traced(module, tmp_path):
    """torch.jit.trace and torch.export record torch's own operations, strict or not."""
    module.eval()
    x = normal(2, K)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, x)
    assert "fastpeft::" not in str(traced.inlined_graph) and "fastpeft_cpp" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), module(x))
    for strict in (False, True):
        program = torch.export.export(module, (x,), strict=strict)
        torch.export.save(program, tmp_path / "program.pt2")
        assert "ops.fastpeft" not in program.graph_module.print_readable(print_output=False)
        torch.testing.assert_close(program.module()(x), module(x))


def test_another_backend_is_refused_inside():
    module = LoRALinear(linear(), R, backend="triton")
    with pytest.raises(ValueError, match=r"lora_linear: backend must be None or 'eager' inside torch\.func"):
        torch.func.jacrev(module)(normal(2, K))


@pytest.mark.parametrize("backend", ["eager", *backends("linear4bit_fwd")])
@pytest.mark.parametrize("op", ["lora_linear", "linear4bit_lora", "lora_adapter", "lora_between"])
def test_saved_tensors_with_other_strides(op, backend):
    """What a hook hands back may lie otherwise: columns first, or a slice of something wider."""
    x, w, a, b = (normal(*shape).requires_grad_() for shape in ((5, K), (N, K), (R, K), (N, R)))
    q = ops.quantize_4bit(w.detach())
    given = {"lora_linear": (x, w, a, b), "linear4bit_lora": (x, q, a, b), "lora_adapter": (x, a, b)}
    given |= {"lora_between": (x, a, b, torch.sin)}
    leaves = [t for t in given[op] if isinstance(t, torch.Tensor)]

    def across(t):
        return t.t().contiguous().t() if t.dim() == 2 else apart(t)

    def apart(t):
        return torch.stack([t, t], -1)[..., 0]

    def gradients(unpack):
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), unpack):
            y = getattr(ops, op)(*given[op], dropout=0.3, backend=backend)
        return torch.autograd.grad(y.sin().sum(), leaves)

    gold = gradients(lambda t: t)
    for unpack in (across, apart):
        torch.testing.assert_close(gradients(unpack), gold)


@pytest.mark.parametrize("backend", ["eager", *backends("linear4bit_fwd")])
@pytest.mark.parametrize("op", ["lora_linear", "linear4bit_lora", "lora_adapter", "lora_between"])
def test_saved_is_what_gradients_read(op, backend):
    """A tensor written to after the forward is an error where torch's own composition has one, and only there."""
    names = {"linear4bit_lora": "xqab", "lora_adapter": "xab"}.get(op, "xwab")
    values = {"x": normal(5, K), "w": normal(N, K), "a": normal(R, K), "b": normal(N, R)}

    def ours(x, w, a, b, q):
        if op == "lora_between":
            return ops.lora_between(x, a, b, torch.neg, weight=w, backend=backend)
        base = {"lora_linear": (w,), "linear4bit_lora": (q,), "lora_adapter": ()}[op]
        return getattr(ops, op)(x, *base, a, b, backend=backend)

    def plain(x, w, a, b, q):
        y = x @ a.t() @ b.t()
        return y if op == "lora_adapter" else y + x @ w.t()

    def refused(call, wanted, written):
        leaves = {name: value.clone().requires_grad_(name in wanted) for name, value in values.items()}
        q = ops.quantize_4bit(values["w"]) if "q" in names else None
        y = call(**leaves, q=q)
        with torch.no_grad():
            target = q.packed if written == "q" and call is ours else leaves["w" if written == "q" else written]
            target.add_(0)
        try:
            y.sum().backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            return True
        return False

    for wanted in ("x", "a", "b", "w", "ab", "xb", "xa", "xab", "wb", "wa"):
        for written in names:
            if "w" not in wanted or "w" in names:
                assert refused(ours, wanted, written) == refused(plain, wanted, written), (wanted, written)


@pytest.mark.parametrize("backend", ["eager", *backends("linear4bit_fwd")])
def test_a_base_of_inference_mode(backend):
    """A frozen first layer: no gradient reads W, and so autograd need not save it."""
    with torch.inference_mode():
        w = normal(N, K)
        q = ops.quantize_4bit(w)
    x, a, b = normal(5, K), normal(R, K).requires_grad_(), normal(N, R).requires_grad_()
    for op, weight in (("lora_linear", w), ("linear4bit_lora", q)):
        y = getattr(ops, op)(x, weight, a, b, backend=backend)
        da, db = torch.autograd.grad(y.sum(), (a, b))
        assert da.isfinite().all() and db.isfinite().all()
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            getattr(ops, op)(x.clone().requires_grad_(), weight, a, b, backend=backend)
