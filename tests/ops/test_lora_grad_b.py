"""ds = scale · dy b, db = scale · dyᵀ s and the bias gradient."""

import pytest
import torch

from cases import backend_cases, normal
from fastpeft import ops
from fastpeft.testing import assert_within_budget


def triple(dy, s, b, need, backend, dtype=None):
    cast = (lambda t: t) if dtype is None else (lambda t: t.to(dtype))
    return ops.lora_grad_b(cast(dy), cast(s), cast(b), scale=0.7, need_db=need[0], need_bias=need[1], backend=backend)


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("backend", "case", "dtype"), backend_cases("lora_grad_b"))
def test_backward(backend, case, dtype, need, poisoned):
    dy, s, b = normal(case.M, case.N, dtype=dtype), normal(case.M, case.R, dtype=dtype), normal(case.N, case.R)
    ours, peer = triple(dy, s, b, need, backend), triple(dy, s, b, need, "eager")
    gold = triple(dy, s, b, need, "eager", torch.float64)
    for name, mine, theirs, true in zip(("ds", "db", "dbias"), ours, peer, gold, strict=True):
        assert_within_budget(mine, theirs, true, dtype, name)
    assert [t.dtype for t in ours] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize(("backend", "case", "dtype"), [c for c in backend_cases("lora_grad_b") if "odd" in c.id])
def test_deterministic(backend, case, dtype):
    dy, s, b = normal(case.M, case.N, dtype=dtype), normal(case.M, case.R, dtype=dtype), normal(case.N, case.R)
    first, second = (triple(dy, s, b, (True, True), backend) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_registration(backend):
    args = (
        normal(3, 5),
        normal(3, 2),
        normal(5, 2),
        0.5,
        True,
        True,
        torch.full((2, 1), 0x5A, dtype=torch.uint8),
        backend,
    )
    torch.library.opcheck(torch.ops.fastpeft.lora_grad_b.default, args)


def test_bad_input():
    with pytest.raises(ValueError, match=r"^lora_grad_b: s must have shape \[M, R\] = \[3, 2\], got \[4, 2\]"):
        ops.lora_grad_b(normal(3, 5), normal(4, 2), normal(5, 2))
    with pytest.raises(TypeError, match=r"^lora_grad_b: s must have the dtype of dy, torch.float32, got torch.float16"):
        ops.lora_grad_b(normal(3, 5), normal(3, 2, dtype=torch.float16), normal(5, 2))
