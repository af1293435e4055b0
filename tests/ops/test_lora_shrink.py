"""s = drop(x) aᵀ."""

import pytest
import torch

from cases import backend_cases, normal
from fastpeft import ops
from fastpeft.testing import assert_within_budget

OP = "lora_shrink"


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("backend", "case", "dtype"), backend_cases(OP))
def test_forward(backend, case, dtype, p, poisoned):
    x, a = normal(case.M, case.K, dtype=dtype), normal(case.R, case.K, std=case.K**-0.5)
    seed = torch.tensor(2**40 + case.M) if p else None
    ours = ops.lora_shrink(x, a, p, seed, backend=backend)
    peer = ops.lora_shrink(x, a, p, seed, backend="eager")
    gold = ops.lora_shrink(x.double(), a.double(), p, seed, backend="eager")
    assert ours.dtype == dtype
    assert_within_budget(ours, peer, gold, dtype)


@pytest.mark.parametrize(("backend", "case", "dtype"), [c for c in backend_cases(OP) if "odd" in c.id])
def test_deterministic(backend, case, dtype):
    x, a, seed = normal(case.M, case.K, dtype=dtype), normal(case.R, case.K), torch.tensor(5)
    first, second = (ops.lora_shrink(x, a, 0.1, seed, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_registration(backend):
    args = (normal(3, 8), normal(2, 8), 0.5, torch.tensor(1), backend)
    torch.library.opcheck(torch.ops.fastpeft.lora_shrink.default, args)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((torch.ones(3), torch.ones(2, 3)), ValueError, r"x must have shape \[M, K\] = \[any, any\], got \[3\]"),
        ((torch.ones(3, 4), torch.ones(2, 3)), ValueError, r"a must have shape \[R, K\] = \[any, 4\], got \[2, 3\]"),
        ((torch.ones(3, 4), torch.ones(2, 4), 1.5), ValueError, r"p must be in \[0, 1\), got 1.5"),
        ((torch.ones(3, 4), torch.ones(2, 4), 0.5), ValueError, "seed must be given where p > 0, got None"),
        ((torch.ones(3, 4), torch.ones(2, 4), 0.5, torch.ones(1)), TypeError, "seed must be int64, got torch.float32"),
    ],
)
def test_bad_input(args, error, text):
    with pytest.raises(error, match=f"^lora_shrink: {text}"):
        ops.lora_shrink(*args)
