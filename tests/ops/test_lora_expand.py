"""y = bias + scale · (s bᵀ + lora_bias), written or added."""

import pytest
import torch

from cases import backend_cases, normal
from fastpeft import ops
from fastpeft.testing import assert_within_budget


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("backend", "case", "dtype"), backend_cases("lora_expand"))
def test_forward(backend, case, dtype, biases, poisoned):
    s, b = normal(case.M, case.R, dtype=dtype), normal(case.N, case.R)
    bias, lora_bias = (normal(case.N, dtype=dtype) if given else None for given in biases)
    ours = ops.lora_expand(s, b, bias, lora_bias, scale=0.7, backend=backend)
    peer = ops.lora_expand(s, b, bias, lora_bias, scale=0.7, backend="eager")
    double = [None if t is None else t.double() for t in (bias, lora_bias)]
    gold = ops.lora_expand(s.double(), b.double(), *double, scale=0.7, backend="eager")
    assert_within_budget(ours, peer, gold, dtype)


@pytest.mark.parametrize(("backend", "case", "dtype"), backend_cases("lora_expand_add"))
def test_add(backend, case, dtype):
    s, b, y = normal(case.M, case.R, dtype=dtype), normal(case.N, case.R), normal(case.M, case.N, dtype=dtype)
    gold = y.double() + 0.7 * s.double() @ b.double().t()
    peer = ops.lora_expand_add(y.clone(), s, b, scale=0.7, backend="eager")
    ours = y.clone()
    assert ops.lora_expand_add(ours, s, b, scale=0.7, backend=backend) is ours
    assert_within_budget(ours, peer, gold, dtype)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_registration(backend):
    s, b, y = normal(3, 2), normal(5, 2), normal(3, 5)
    torch.library.opcheck(torch.ops.fastpeft.lora_expand.default, (s, b, None, normal(5), 0.5, backend))
    torch.library.opcheck(torch.ops.fastpeft.lora_expand_add.default, (y, s, b, 0.5, backend))


def test_bad_input():
    s, b = normal(3, 2), normal(5, 2)
    with pytest.raises(ValueError, match=r"^lora_expand: b must have shape \[N, R\] = \[any, 2\], got \[5, 3\]"):
        ops.lora_expand(s, normal(5, 3))
    with pytest.raises(ValueError, match=r"^lora_expand: bias must have shape \[N\] = \[5\], got \[4\]"):
        ops.lora_expand(s, b, normal(4))
    with pytest.raises(ValueError, match=r"^lora_expand_add: y must be contiguous, got strides \(1, 3\)"):
        ops.lora_expand_add(normal(5, 3).t(), s, b)
    with pytest.raises(
        TypeError, match=r"^lora_expand_add: y must have the dtype of s, torch.float32, got torch.bfloat16"
    ):
        ops.lora_expand_add(normal(3, 5, dtype=torch.bfloat16), s, b)
