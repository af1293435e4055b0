"""da = dsᵀ drop(x) and mask ∘ (ds a) / keep."""

import pytest
import torch

from cases import backend_cases, normal
from fastpeft import ops
from fastpeft.testing import assert_within_budget


def pair(x, ds, a, p, need, backend, dtype=None):
    cast = (lambda t: t) if dtype is None else (lambda t: t.to(dtype))
    seed = torch.tensor(77) if p else None
    return ops.lora_grad_a(cast(x), cast(ds), cast(a), p, seed, need_dx=need[0], need_da=need[1], backend=backend)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("backend", "case", "dtype"), backend_cases("lora_grad_a"))
def test_backward(backend, case, dtype, need, p, poisoned):
    x, ds = normal(case.M, case.K, dtype=dtype), normal(case.M, case.R, dtype=dtype)
    a = normal(case.R, case.K, std=0.1)
    ours, peer = pair(x, ds, a, p, need, backend), pair(x, ds, a, p, need, "eager")
    gold = pair(x, ds, a, p, need, "eager", torch.float64)
    for name, mine, theirs, true in zip(("da", "dx"), ours, peer, gold, strict=True):
        assert_within_budget(mine, theirs, true, dtype, name)
    assert [t.dtype for t in ours] == [torch.float32, dtype]


@pytest.mark.parametrize(("backend", "case", "dtype"), [c for c in backend_cases("lora_grad_a") if "odd" in c.id])
def test_deterministic(backend, case, dtype):
    x, ds, a = normal(case.M, case.K, dtype=dtype), normal(case.M, case.R, dtype=dtype), normal(case.R, case.K)
    first, second = (pair(x, ds, a, 0.1, (True, True), backend) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_registration(backend):
    args = (
        normal(3, 8),
        normal(3, 2),
        normal(2, 8),
        0.5,
        torch.tensor(1),
        True,
        True,
        torch.full((2, 1), 0x5A, dtype=torch.uint8),
        backend,
    )
    torch.library.opcheck(torch.ops.fastpeft.lora_grad_a.default, args)


def test_bad_input():
    with pytest.raises(ValueError, match=r"^lora_grad_a: ds must have shape \[M, R\] = \[3, 2\], got \[3, 4\]"):
        ops.lora_grad_a(normal(3, 5), normal(3, 4), normal(2, 5))
    with pytest.raises(ValueError, match=r"^lora_grad_a: seed must have one element, got 2"):
        ops.lora_grad_a(normal(3, 5), normal(3, 2), normal(2, 5), 0.1, torch.tensor([1, 2]))
