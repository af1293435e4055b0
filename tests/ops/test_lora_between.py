"""lora_between: values and gradients with a function of rank space inside, on every backend."""

import pytest
import torch
from torch import nn

from cases import SMALL, backend_cases, normal
from fastpeft import dispatch, ops, testing


def tensors(case, dtype, base):
    M, K, N, R = case.M, case.K, case.N, case.R
    return {
        "x": normal(M, K, dtype=dtype).requires_grad_(),
        "weight": normal(N, K, dtype=dtype, std=K**-0.5) if base else None,
        "lora_A": normal(2 * R, K, std=K**-0.5).requires_grad_(),
        "lora_B": normal(N, R, std=0.3).requires_grad_(),
        "bias": normal(N, dtype=dtype).requires_grad_() if base else None,
        "lora_bias": normal(N).requires_grad_(),
        "inner": normal(R).requires_grad_(),
    }


def between(inner):
    def gate(s):
        values, logits = s.chunk(2, dim=-1)
        return values * torch.sigmoid(logits + inner.to(s.dtype))

    return gate


def formula(given, kind, scale):
    t = {name: None if v is None else v.detach().to(kind).requires_grad_(v.requires_grad) for name, v in given.items()}
    h = between(t["inner"])(t["x"] @ t["lora_A"].t())
    y = scale * (h @ t["lora_B"].t() + t["lora_bias"])
    if t["weight"] is not None:
        y = y + t["x"] @ t["weight"].t() + t["bias"]
    return t, y


def results(t, y):
    torch.manual_seed(5)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    return {"y": y.detach()} | {name: v.grad for name, v in t.items() if v is not None and v.grad is not None}


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(("backend", "case", "dtype"), backend_cases("lora_between_fwd"))
def test_parity(backend, case, dtype, base, poisoned):
    if backend == "cpp" and case.K * case.N > 2**18:
        case = SMALL[-1]
    given = tensors(case, dtype, base)
    x, inner = given["x"], given["inner"]
    rest = {name: value for name, value in given.items() if name not in ("x", "inner", "lora_A", "lora_B")}
    y = ops.lora_between(x, given["lora_A"], given["lora_B"], between(inner), scale=0.7, backend=backend, **rest)
    ours = results(given, y)
    peer = results(*formula(given, dtype, 0.7))
    gold = results(*formula(given, torch.float64, 0.7))
    testing.assert_all_within_budget(ours, peer, gold, dtype)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_dropout_is_the_reference_s(backend):
    if dispatch.unmet("lora_between_fwd", backend, "cpu", torch.float32):
        pytest.skip(f"{backend} does not serve here")
    case, grads = SMALL[0], []
    given = tensors(case, torch.float32, True)
    for name in ("eager", backend):
        for value in given.values():
            if value is not None:
                value.grad = None
        torch.manual_seed(1)
        y = ops.lora_between(
            given["x"], given["lora_A"], given["lora_B"], between(given["inner"]), weight=given["weight"],
            dropout=0.4, backend=name,
        )  # fmt: skip
        y.square().sum().backward()
        grads.append([y.detach()] + [v.grad for v in given.values() if v is not None and v.grad is not None])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_trained_weight_shapes_and_second_derivative():
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    w, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 6), (4, 6), (5, 4)))

    def run(x, w, a, b):
        return ops.lora_between(x, a, b, torch.tanh, weight=w, scale=0.5)

    assert run(x, w, a, b).shape == (2, 3, 5)
    torch.autograd.gradcheck(run, (x, w, a, b))
    torch.autograd.gradgradcheck(run, (x, w, a, b))
    hessian = torch.autograd.functional.hessian(lambda t: run(t, w, a, b).square().sum(), x.detach())
    plain = torch.autograd.functional.hessian(
        lambda t: (t @ w.t() + 0.5 * torch.tanh(t @ a.t()) @ b.t()).square().sum(), x.detach()
    )
    torch.testing.assert_close(hessian, plain)


def test_what_no_gradient_reads_is_not_kept():
    x, w, a, b = torch.randn(4, 6), torch.randn(5, 6), torch.randn(3, 6), torch.randn(5, 3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.lora_between(x, a, b, nn.Identity(), weight=w)
    assert all(t.data_ptr() != x.data_ptr() for t in kept)


def test_explain_and_compile():
    x, w, a, b = torch.randn(4, 6), torch.randn(5, 6), torch.randn(3, 6), torch.randn(5, 3)

    def run(x):
        return ops.lora_between(x, a, b, torch.relu, weight=w)

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"lora_A": torch.ones(3, 5)}, ValueError, "x must have shape"),
        ({"lora_B": torch.ones(4, 3)}, ValueError, "lora_B must have shape"),
        ({"between": lambda s: s[..., :2]}, ValueError, r"between must give a tensor of shape \[4, 3\], got \[4, 2\]"),
        ({"between": lambda s: s.to(torch.complex64)}, TypeError, "between must give a dense floating point tensor"),
        ({"between": lambda s: s.int()}, TypeError, "between must give .* got torch.int32"),
        ({"between": lambda s: None}, TypeError, "between must give .* got NoneType"),
        ({"between": "relu"}, TypeError, "between must be a function of s, got str"),
        ({"weight": torch.ones(5, 6, dtype=torch.bfloat16)}, TypeError, "weight must have the dtype of x"),
        ({"dropout": 1.0}, ValueError, "dropout must be in"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input(change, error, message):
    good = {"x": torch.ones(4, 6), "lora_A": torch.ones(3, 6), "lora_B": torch.ones(5, 3), "between": torch.relu}
    good |= {"weight": torch.ones(5, 6), **change}
    with pytest.raises(error, match=f"lora_between: {message}"):
        ops.lora_between(good.pop("x"), good.pop("lora_A"), good.pop("lora_B"), good.pop("between"), **good)
