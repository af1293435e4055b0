"""The 4-bit products in Triton under the interpreter: within the error budget of fp64."""

import pytest
import torch

from fastpeft.kernels import linear4bit, linear4bit_small
from fastpeft.reference import linear4bit as eager
from fastpeft.reference.lora_linear import lora_linear_bwd, lora_linear_fwd
from fastpeft.testing import assert_all_within_budget, assert_within_budget
from kernels_fourbit_cases import MARKS, NF4_64, Case

pytestmark = MARKS

FORMATS = [(quant_type, size, double) for quant_type, size in (NF4_64, ("fp4", 32)) for double in (True, False)]


@pytest.fixture(params=[torch.float32, torch.float16], ids=["fp32", "fp16"])
def dtype(request):
    return request.param


# (M, N, K, R): R = 0 has no adapter.
CASES = [
    pytest.param(16, 64, 128, 16, id="round"),
    pytest.param(1, 70, 96, 3, id="row"),
    pytest.param(5, 33, 192, 0, id="plain"),
    pytest.param(33, 24, 320, 70, id="rank70"),
    pytest.param(0, 24, 64, 4, id="empty"),
    pytest.param(64, 40, 1056, 4, id="splits"),
]


@pytest.mark.parametrize("M, N, K, R", CASES)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f[0]}-{f[1]}-{'double' if f[2] else 'plain'}")
def test_small(M, N, K, R, format, dtype):
    c = Case(M, N, K, R, dtype, format=format)
    b = c.b if R else None
    y = linear4bit_small.linear4bit_small(c.x, *c.packed, N, c.s, b, c.bias, c.lora_bias, 0.5)

    def forward(x, w, s, b, bias, lora_bias):
        y = x @ w.T + bias
        return y + 0.5 * (s @ b.T + lora_bias) if R else y

    names = ("x", "w", "s", "b", "bias", "lora_bias")
    same = [None if getattr(c, n) is None else getattr(c, n).to(dtype) for n in names]
    assert_within_budget(y, forward(*same), forward(*c.wide(*names)), dtype)

    start = torch.randn(M, K).to(dtype)
    for dx0 in (None, start):
        dx = linear4bit_small.linear4bit_small_dx(c.dy, *c.packed, K, None if dx0 is None else dx0.clone())
        gold = c.dy.double() @ c.w.double() + (0 if dx0 is None else dx0.double())
        assert_within_budget(dx, (c.dy @ c.w) + (0 if dx0 is None else dx0), gold, dtype)


def test_small_blocks_longer_than_a_row():
    """A block of 4096 spans rows of 96 and ends within one; no bias, no adapter."""
    c = Case(3, 90, 96, 0, torch.float32, format=("nf4", 4096, False))
    y = linear4bit_small.linear4bit_small(c.x, *c.packed, 90, None, None, None, None, 1.0)
    assert_within_budget(y, c.x @ c.w.T, c.x.double() @ c.w.double().T, torch.float32)


def test_small_says_what_it_does_not_serve():
    assert linear4bit_small.small_unmet(64, 96, 64) == ""
    assert "at most 64 rows" in linear4bit_small.small_unmet(65, 96, 64)
    assert "multiple of 32" in linear4bit_small.small_unmet(4, 80, 64)


# Paths of the composition: few rows, many rows, and K that only the dequantised weight serves.
LINEAR = [
    pytest.param(9, 40, 64, 4, id="small"),
    pytest.param(70, 24, 64, 4, id="many-rows"),
    pytest.param(65, 24, 80, 70, id="rank70"),
    pytest.param(6, 13, 45, 3, id="odd"),
    pytest.param(1, 8, 80, 1, id="K80"),
    pytest.param(0, 8, 64, 2, id="empty"),
    pytest.param(9, 40, 64, 0, id="small-plain"),
    pytest.param(70, 13, 45, 0, id="odd-plain"),
]


@pytest.mark.parametrize("augmented", [False, True], ids=["accumulate", "augmented"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
@pytest.mark.parametrize("M, N, K, R", LINEAR)
def test_linear4bit(M, N, K, R, p, dtype, augmented, monkeypatch):
    monkeypatch.setattr(linear4bit, "choose_augmented", lambda *_: augmented)
    c = Case(M, N, K, R, dtype, p if R else 0.0)
    names = ("y", "dx", "da", "db", "dbias")

    def step(fwd, bwd):
        y, s = fwd(c.x, *c.packed, N, c.a, c.b, c.bias, c.lora_bias, 0.5, c.p, c.seed)
        grads = bwd(c.dy, c.x, *c.packed, K, c.a, c.b, s, 0.5, c.p, c.seed, True, bool(R), bool(R), True)
        return dict(zip(names, (y, *grads), strict=True))

    ours = step(linear4bit.linear4bit_fwd, linear4bit.linear4bit_bwd)
    peer = step(eager.linear4bit_fwd, eager.linear4bit_bwd)
    x, dy, w, a, b, bias, lora_bias = c.wide("x", "dy", "w", "a", "b", "bias", "lora_bias")
    if R:
        y, s = lora_linear_fwd(x, w, a, b, bias, lora_bias, 0.5, c.p, c.seed)
        grads = lora_linear_bwd(dy, x, w, a, b, s, 0.5, c.p, c.seed, True, True, True, True)
        gold = dict(zip(names, (y, *grads), strict=True))
    else:
        gold = {"y": x @ w.T + bias, "dx": dy @ w, "da": dy[:0, 0], "db": dy[:0, 0], "dbias": dy.sum(0)}
    assert ours["y"].dtype == ours["dx"].dtype == dtype and ours["dbias"].dtype == torch.float32
    assert_all_within_budget(ours, peer, gold, dtype)


@pytest.mark.parametrize("R", [0, 4])
def test_only_what_is_asked_for(R):
    c = Case(4, 8, 64, R, torch.float32)
    empty = c.x.new_empty(0)
    call = (c.a, c.b, empty, 0.5, 0.0, None)
    none = linear4bit.linear4bit_bwd(c.dy, empty, *c.packed, 64, *call, False, False, False, False)
    assert [t.shape for t in none] == [(0,)] * 4
    dx, da, db, _ = linear4bit.linear4bit_bwd(c.dy, empty, *c.packed, 64, *call, True, False, False, False)
    assert dx.shape == (4, 64) and da.shape == db.shape == (0,)
    expanded = torch.ones(1, 1).expand(4, 8)  # what sum().backward() sends
    dx, *_ = linear4bit.linear4bit_bwd(expanded, empty, *c.packed, 64, *call, True, False, False, False)
    assert dx.shape == (4, 64)


def test_deterministic():
    c = Case(9, 40, 1056, 4, torch.float16, 0.3)
    runs = []
    for _ in range(2):
        y, s = linear4bit.linear4bit_fwd(c.x, *c.packed, 40, c.a, c.b, c.bias, None, 0.5, c.p, c.seed)
        flags = (True, True, True, True)
        runs.append((y, *linear4bit.linear4bit_bwd(c.dy, c.x, *c.packed, 1056, c.a, c.b, s, 0.5, c.p, c.seed, *flags)))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
