"""Derivatives of derivatives, by every road to them, against the plain composition with the same mask."""

import copy
import importlib
import itertools

import pytest
import torch
from torch.autograd import functional

from cases import normal
from fastpeft import ops
from fastpeft.integrations import accelerate
from fastpeft.nn import LoRALayer, LoRALinear, QLoRALinear
from fastpeft.ops._calls import draw_seed
from fastpeft.reference.dropout import keep_factor, keep_mask
from fastpeft.testing import backends

SCALE = 0.7
QUANTIZED = ops.quantize_4bit(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)))
# what each operator is called with, in order; the 4-bit weight stands apart
SHAPES = {"x": (4, 6), "weight": (5, 6), "lora_A": (2, 6), "lora_B": (5, 2), "bias": (5,), "lora_bias": (5,)}
TAKES = {
    "lora_linear": ("x", "weight", "lora_A", "lora_B", "bias", "lora_bias"),
    "lora_adapter": ("x", "lora_A", "lora_B", "lora_bias"),
    "lora_between": ("x", "weight", "lora_A", "lora_B", "bias", "lora_bias"),
    "linear4bit": ("x", "bias"),
    "linear4bit_lora": ("x", "lora_A", "lora_B", "bias", "lora_bias"),
}


def ours(op, p, backend):
    """The operator as a function of its differentiable tensors."""

    def call(*tensors):
        given = dict(zip(TAKES[op], tensors, strict=True))
        if "4bit" in op:
            given["weight"] = QUANTIZED
        if op == "lora_between":
            given["between"] = torch.tanh
        options = {} if op == "linear4bit" else {"scale": SCALE, "dropout": p}
        torch.manual_seed(1)
        return getattr(ops, op)(**given, **options, backend=backend)

    return call


def plain(op, p):
    """The same in torch's own operations, with the mask of the same seed."""

    def call(*tensors):
        given = dict(zip(TAKES[op], tensors, strict=True))
        x = given["x"]
        w = given.get("weight", ops.dequantize_4bit(QUANTIZED, x.dtype))
        y = torch.zeros(()) if op == "lora_adapter" else x @ w.t() + given["bias"]
        if op == "linear4bit":
            return y
        torch.manual_seed(1)
        dropped = x * keep_mask(draw_seed("cpu"), *x.shape, p, "cpu") * keep_factor(p) if p else x
        s = dropped @ given["lora_A"].t()
        s = s.tanh() if op == "lora_between" else s
        return y + SCALE * (s @ given["lora_B"].t() + given["lora_bias"])

    return call


def tensors(op, dtype, wanted=None):
    return [normal(*SHAPES[name], dtype=dtype).requires_grad_(wanted is None or name in wanted) for name in TAKES[op]]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("op", TAKES)
def test_gradgradcheck(op, p):
    """Every choice of x, W, A and B to be differentiated: what is saved differs, the second derivatives do not."""
    names = [name for name in TAKES[op] if "bias" not in name]
    for size in range(1, len(names) + 1):
        for wanted in itertools.combinations(names, size):
            given = tensors(op, torch.float64, (*wanted, "bias", "lora_bias"))
            assert torch.autograd.gradcheck(ours(op, p, "eager"), given, fast_mode=True), wanted
            assert torch.autograd.gradgradcheck(ours(op, p, "eager"), given, fast_mode=True), wanted


def penalty(f, given):
    """A gradient penalty, differentiated in everything; what nothing depends on is None, never zeros."""
    leaves = [t.detach().clone().requires_grad_() for t in given]
    gradients = torch.autograd.grad(f(*leaves).tanh().sum(), leaves, create_graph=True)
    total = sum((g * torch.linspace(-1, 1, g.numel()).view_as(g)).sum().square() for g in gradients)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*gradients, *(torch.zeros(()) if t is None else t + 1 for t in found)]


def thrice(f, given):
    """Through backward() with create_graph, and once more than twice."""
    x = given[0].detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x, *given[1:]).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    second.square().sum().backward()
    return [first, second, x.grad]


def along(f, given):
    return f, tuple(given), tuple(torch.linspace(-1, 1, t.numel()).view_as(t).to(t.dtype) for t in given)


def scalar(f):
    return lambda *given: f(*given).tanh().square().sum()


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [t for part in value for t in flat(part)]


ROADS = {
    "penalty": penalty,
    "thrice": thrice,
    "hvp": lambda f, given: functional.hvp(*along(scalar(f), given)),
    "vhp": lambda f, given: functional.vhp(*along(scalar(f), given)),
    "jvp": lambda f, given: functional.jvp(*along(f, given)),
    "hessian": lambda f, given: functional.hessian(scalar(f), tuple(given)),
    "hessian vectorised": lambda f, given: functional.hessian(scalar(f), tuple(given), vectorize=True),
    "jacobian vectorised": lambda f, given: functional.jacobian(f, tuple(given), vectorize=True),
}


def agree(found, expected):
    found, expected = flat(found), flat(expected)
    assert len(found) == len(expected)
    for value, gold in zip(found, expected, strict=True):
        torch.testing.assert_close(value, gold, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("op", TAKES)
def test_roads(op, p, road):
    for backend in [name for name in backends("linear4bit_fwd") if name == "cpp"]:
        given = tensors(op, torch.float32)
        agree(ROADS[road](ours(op, p, backend), given), ROADS[road](plain(op, p), given))


@pytest.mark.parametrize("backend", backends("lora_linear_fwd"))
@pytest.mark.parametrize("wanted", [("x", "lora_B"), ("lora_A", "lora_B"), ("x", "weight", "lora_B")])
def test_frozen_factors(backend, wanted):
    """A frozen A keeps no x and a frozen x no A, and yet d²/dB dx and d²/dB dA are right."""

    def second(f):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in given]
        free = [t for t in leaves if t.requires_grad]
        first = torch.autograd.grad(f(*leaves).tanh().sum(), free, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), free)

    for op in ("lora_linear", "lora_adapter"):
        given = tensors(op, torch.float32, wanted)
        agree(second(ours(op, 0.3, backend)), second(plain(op, 0.3)))


@pytest.mark.parametrize("road", ["penalty", "hvp", "vhp", "jvp", "parameters"])
@pytest.mark.parametrize("kind", ["peft_cases", "peft_4bit_cases"])
def test_accelerated_model(kind, road):
    """A PEFT model's own second derivatives, with the mask that our operator drew."""
    pytest.importorskip("bitsandbytes" if "4bit" in kind else "peft")
    cases = importlib.import_module(kind)
    model = cases.toy(lora_dropout=0.3).train()
    peer = copy.deepcopy(model)
    assert not accelerate(model).skipped
    cases.recover_dropout(peer)
    found = []
    for each in (model, peer):

        def call(x, each=each):
            torch.manual_seed(1)
            return each(x)

        x = cases.batch()["x"]
        if road == "parameters":
            (first,) = torch.autograd.grad(call(x.requires_grad_()).tanh().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), [p for p in each.parameters() if p.requires_grad]))
        else:
            found.append(ROADS[road](call, (x,)))
    agree(*found)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoRALinear(torch.nn.Linear(6, 5), rank=2, dropout=0.0),
        lambda: LoRALayer(6, 5, rank=2, dropout=0.0),
        lambda: QLoRALinear(torch.nn.Linear(64, 5), rank=2, dropout=0.0),
    ],
    ids=["LoRALinear", "LoRALayer", "QLoRALinear"],
)
def test_modules(make):
    """A gradient penalty's gradient reaches the parameters of a module."""
    module = make()
    torch.nn.init.normal_(module.lora_B, std=0.1)
    x = normal(4, module.in_features).requires_grad_()
    a, b = module.factors()
    w = module.dequantize() if isinstance(module, QLoRALinear) else getattr(module, "weight", None)

    def definition(x):
        base = 0.0 if w is None else x @ w.t() + module.bias
        return base + module.scaling * (x @ a.t() @ b.t())

    found = []
    for call in (module, definition):
        (first,) = torch.autograd.grad(call(x).tanh().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (x, module.lora_A, module.lora_B)))
    agree(*found)
