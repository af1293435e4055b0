"""The GEMM that takes the rank-R product into its sum, forward and for dx (a GPU's strategy: no C++ form)."""

import pytest
import torch

from cases import Case, backend_cases, normal
from fastpeft import ops
from fastpeft.testing import assert_within_budget

# The copy engine wants rows of whole 16 bytes: K and N are multiples of 8, M and the rank are free.
ALIGNED = [Case(17, 32, 64, 3, "aligned"), Case(33, 304, 40, 24, "blocks")]
DTYPES = [torch.float16]
OP = "lora_linear_fused_fwd"
RUNS = pytest.mark.parametrize("backend", sorted({param.values[0] for param in backend_cases(OP)}))


@RUNS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_forward(backend, case, dtype, poisoned):
    x, w, s = (
        normal(case.M, case.K, dtype=dtype),
        normal(case.N, case.K, dtype=dtype, std=0.1),
        normal(case.M, case.R, dtype=dtype),
    )
    b, bias, lora_bias = normal(case.N, case.R), normal(case.N, dtype=dtype), normal(case.N)
    given = (x, w, s, b, bias, lora_bias)
    ours, peer = (ops.lora_linear_fused_fwd(*given, scale=0.7, backend=name) for name in (backend, "eager"))
    gold = ops.lora_linear_fused_fwd(*(t.double() for t in given), scale=0.7, backend="eager")
    assert_within_budget(ours, peer, gold, dtype)


@RUNS
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_dx(backend, case, dtype, p, poisoned):
    dy, w, ds = (
        normal(case.M, case.N, dtype=dtype),
        normal(case.N, case.K, dtype=dtype, std=0.1),
        normal(case.M, case.R, dtype=dtype),
    )
    given, seed = (dy, w, ds, normal(case.R, case.K)), torch.tensor(12) if p else None
    ours, peer = (ops.lora_linear_fused_dx(*given, p, seed, backend=name) for name in (backend, "eager"))
    gold = ops.lora_linear_fused_dx(*(t.double() for t in given), p, seed, backend="eager")
    assert_within_budget(ours, peer, gold, dtype)


def test_registration():
    x, w, s, a, b = normal(3, 8), normal(5, 8), normal(3, 2), normal(2, 8), normal(5, 2)
    torch.library.opcheck(torch.ops.fastpeft.lora_linear_fused_fwd.default, (x, w, s, b, None, None, 0.5, "eager"))
    torch.library.opcheck(torch.ops.fastpeft.lora_linear_fused_dx.default, (normal(3, 5), w, s, a, 0.0, None, "eager"))


def test_bad_input():
    with pytest.raises(
        ValueError, match=r"backend must be able to serve torch.float32 on cpu .*got 'cpp', which requires an impl"
    ):
        ops.lora_linear_fused_fwd(normal(3, 8), normal(5, 8), normal(3, 2), normal(5, 2), backend="cpp")
    with pytest.raises(TypeError, match=r"^lora_linear_fused_dx: ds must have the dtype of dy"):
        ops.lora_linear_fused_dx(normal(3, 5), normal(5, 8), normal(3, 2, dtype=torch.float16), normal(2, 8))
