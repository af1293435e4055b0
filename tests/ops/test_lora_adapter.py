"""lora_adapter: parity of value and gradients with plain torch, the same mask both ways, graphs, and its errors."""

import pytest
import torch

from fastpeft import testing
from fastpeft.ops._calls import draw_seed
from fastpeft.ops.lora_adapter import lora_adapter
from fastpeft.reference.dropout import keep_factor, keep_mask

# x shape, N, R, why
CASES = [
    ((32, 64), 48, 8, "round"),
    ((17, 65), 33, 3, "odd"),
    ((1, 64), 40, 4, "row"),
    ((0, 64), 40, 4, "empty"),
    ((2, 5, 48), 64, 16, "3-D"),
    ((300,), 20, 1, "1-D"),
    ((70, 768), 768, 16, "bert"),
]
IDS = [case[-1] for case in CASES]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("y", "dx", "da", "db", "dbias")


def make(shape, N, R, dtype, seed=0, factors=torch.float32):
    torch.manual_seed(seed)
    K = shape[-1]
    x = torch.randn(shape).to(dtype)
    a = (torch.randn(R, K) / K**0.5).to(factors)
    b = torch.randn(N, R).to(factors)
    return x, a, b, torch.randn(N).to(factors), torch.randn(*shape[:-1], N).to(dtype)


def mask_of(x, p, seed):
    """The mask that the operator draws after torch.manual_seed(seed)."""
    if p == 0:
        return torch.ones_like(x)
    torch.manual_seed(seed)
    drawn = draw_seed("cpu")
    K = x.shape[-1]
    return keep_mask(drawn, x.numel() // K, K, p, x.device).view(x.shape).to(x.dtype) * keep_factor(p)


def plain(x, a, b, bias, dy, scale, p, seed, dtype):
    """The definition in ``dtype``, differentiated by torch."""
    mask = mask_of(x, p, seed).to(dtype)
    x, a, b, bias = (t.detach().to(dtype).requires_grad_() for t in (x, a, b, bias))
    y = scale * ((x * mask) @ a.t() @ b.t() + bias)
    y.backward(dy.to(dtype))
    return dict(zip(NAMES, (y.detach(), x.grad, a.grad, b.grad, bias.grad), strict=True))


def ours(x, a, b, bias, dy, scale, p, seed, backend):
    x, a, b, bias = (t.detach().requires_grad_() for t in (x, a, b, bias))
    torch.manual_seed(seed)
    y = lora_adapter(x, a, b, bias, scale=scale, dropout=p, backend=backend)
    y.backward(dy)
    return dict(zip(NAMES, (y.detach(), x.grad, a.grad, b.grad, bias.grad), strict=True))


def backends(dtype=torch.float32):
    able = testing.backends("lora_shrink", "cpu", dtype)
    # bf16 products of Triton's interpreter are not reliable.
    return ["eager", *(name for name in able if name != "triton" or dtype != torch.bfloat16)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, N, R, why", CASES, ids=IDS)
def test_forward_backward(shape, N, R, why, dtype, p):
    inputs = make(shape, N, R, dtype)
    gold = plain(*inputs, 0.7, p, 5, torch.float64)
    for backend in backends(dtype):
        if backend == "triton" and why == "bert":  # an interpreted program costs milliseconds
            continue
        got = ours(*inputs, 0.7, p, 5, backend)
        assert got["y"].dtype == got["dx"].dtype == dtype and got["da"].dtype == torch.float32
        testing.assert_all_within_budget(got, plain(*inputs, 0.7, p, 5, dtype), gold, dtype)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(dtype, factors):
    inputs = make((9, 32), 24, 4, dtype, factors=factors)
    gold = plain(*inputs, 2.0, 0.0, 0, torch.float64)
    low = dtype if dtype != torch.float32 else factors
    got = ours(*inputs, 2.0, 0.0, 0, None)
    assert [got[name].dtype for name in NAMES] == [dtype, dtype, factors, factors, factors]
    testing.assert_all_within_budget(got, plain(*inputs, 2.0, 0.0, 0, low), gold, low)


@pytest.mark.parametrize("backend", backends())
def test_strides(backend):
    x, a, b, bias, dy = make((6, 32), 24, 4, torch.float32)
    gold = ours(x, a, b, bias, dy, 0.5, 0.0, 0, "eager")
    views = (x.t().contiguous().t(), a.t().contiguous().t(), b.t().contiguous().t(), bias, dy.t().contiguous().t())
    testing.assert_all_within_budget(ours(*views, 0.5, 0.0, 0, backend), gold, gold, torch.float32)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    torch.manual_seed(1)
    x, a, b, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 7), (3, 7), (4, 3), (4,)))

    def call(*tensors):
        torch.manual_seed(2)
        return lora_adapter(*tensors, scale=0.5, dropout=p, backend="eager")

    assert torch.autograd.gradcheck(call, (x, a, b, bias))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("needed", [(), (0,), (1,), (2,), (3,), (0, 2)])
def test_needs_input_grad(backend, needed):
    """What needs no gradient gets none, and the others are as if all were asked for."""
    x, a, b, bias, dy = make((6, 32), 24, 4, torch.float32)
    full = ours(x, a, b, bias, dy, 0.5, 0.2, 3, backend)
    tensors = [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate((x, a, b, bias))]
    torch.manual_seed(3)
    y = lora_adapter(*tensors, scale=0.5, dropout=0.2, backend=backend)
    assert y.requires_grad == bool(needed)
    if needed:
        y.backward(dy)
    for i, name in enumerate(NAMES[1:]):
        assert (tensors[i].grad is None) == (i not in needed)
        if i in needed:
            assert torch.equal(tensors[i].grad, full[name])


def test_tensor_scale():
    x, a, b, bias, _ = make((6, 32), 24, 4, torch.float32)
    scale = torch.tensor(0.25)
    torch.testing.assert_close(lora_adapter(x, a, b, bias, scale=scale), lora_adapter(x, a, b, bias, scale=0.25))


@pytest.mark.parametrize("backend", backends())
def test_deterministic(backend):
    inputs = make((33, 65), 31, 5, torch.float32)
    first, second = (ours(*inputs, 1.0, 0.2, 9, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_autocast():
    x, a, b, bias, _ = make((6, 32), 24, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_adapter(x.requires_grad_(), a.requires_grad_(), b, bias)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == a.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", backends())
def test_compile(backend):
    x, a, b, bias, dy = make((6, 32), 24, 4, torch.float32)
    gold = ours(x, a, b, bias, dy, 0.5, 0.0, 0, backend)
    compiled = torch.compile(lora_adapter, fullgraph=True, backend="aot_eager")
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b, bias)]
    y = compiled(*leaves, scale=0.5, backend=backend)
    y.backward(dy)
    got = dict(zip(NAMES, (y.detach(), *(t.grad for t in leaves)), strict=True))
    testing.assert_all_within_budget(got, gold, gold, torch.float32)


def test_compile_symbolic_sizes():
    compiled = torch.compile(lora_adapter, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (6, 9):
        x, a, b, bias, _ = make((M, 32), 24, 4, torch.float32)
        torch.testing.assert_close(compiled(x, a.requires_grad_(), b, bias), lora_adapter(x, a, b, bias))


def test_compile_dropout():
    """One mask for forward and backward: with b = 1 and a = 1, dx is where y says that x was kept."""
    x = torch.eye(64).requires_grad_()
    a, b = torch.ones(1, 64, requires_grad=True), torch.ones(1, 1)
    compiled = torch.compile(lora_adapter, fullgraph=True, backend="aot_eager")
    y = compiled(x, a, b, dropout=0.5)
    y.sum().backward()
    assert 0 < (y == 0).sum() < 64
    torch.testing.assert_close(y.detach().squeeze(1), x.grad.diagonal())
    torch.testing.assert_close(a.grad.squeeze(0), y.detach().squeeze(1))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"x": torch.zeros(6, 31)},
            ValueError,
            r"lora_adapter: x must have shape \[..., in_features\] = \[..., 32\], got \[6, 31\]",
        ),
        ({"lora_A": torch.zeros(5, 31)}, ValueError, r"lora_adapter: lora_A must have shape \[rank, in_features\]"),
        ({"lora_B": torch.zeros(24, 5)}, ValueError, "lora_adapter: lora_B must have shape"),
        (
            {"lora_bias": torch.zeros(24, dtype=torch.int64)},
            TypeError,
            "lora_adapter: lora_bias must be a floating point",
        ),
        ({"lora_bias": torch.zeros(23)}, ValueError, "lora_adapter: lora_bias must have shape"),
        ({"dropout": 1.0}, ValueError, r"lora_adapter: dropout must be in \[0, 1\), got 1.0"),
        ({"backend": "fast"}, ValueError, "lora_adapter: backend must be one of"),
        ({"x": torch.zeros(6, 32, dtype=torch.int64)}, TypeError, "lora_adapter: x must be float32"),
        ({"x": torch.tensor(1.0)}, ValueError, "lora_adapter: x must have at least one dimension"),
        ({"x": None}, TypeError, "lora_adapter: x must be a tensor, got NoneType"),
    ],
)
def test_bad_input(change, error, message):
    x, a, b, bias, _ = make((6, 32), 24, 4, torch.float32)
    with pytest.raises(error, match=message):
        lora_adapter(**{"x": x, "lora_A": a, "lora_B": b, "lora_bias": bias, **change})
