"""What torch's FlopCounterMode counts for our operators: what it counts for the plain composition."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cases import normal
from fastpeft import dispatch, ops
from fastpeft.ops import _flops

M, K, N, R = 6, 64, 32, 4


def counted(f, *leaves):
    """FLOP of f(*leaves) and of its gradients."""
    with FlopCounterMode(display=False) as forward:
        y = f(*leaves)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_every_operator_has_a_formula():
    assert _flops.FORMULAS.keys() == dispatch.ROWS.keys()


@pytest.mark.parametrize("wanted", ["xab", "xb", "xa", "ab", "b", "x"])
@pytest.mark.parametrize("op", ["lora_linear", "linear4bit_lora"])
def test_base_and_adapter(op, wanted):
    given = {"x": normal(M, K), "w": normal(N, K), "a": normal(R, K), "b": normal(N, R)}
    x, w, a, b = (given[name].requires_grad_(name in wanted) for name in "xwab")
    weight = ops.quantize_4bit(w) if op == "linear4bit_lora" else w
    ours = counted(lambda x, a, b: getattr(ops, op)(x, weight, a, b, scale=2.0), x, a, b)
    assert ours == counted(lambda x, a, b: x @ w.t() + 2.0 * (x @ a.t() @ b.t()), x, a, b)
    assert ours[0] == 2 * M * (N * K + R * K + N * R)


def test_adapter_and_base_alone():
    x, a, b, w = (
        normal(M, K).requires_grad_(),
        normal(R, K).requires_grad_(),
        normal(N, R).requires_grad_(),
        normal(N, K),
    )
    q = ops.quantize_4bit(w)
    assert counted(lambda x: ops.lora_adapter(x, a, b), x) == counted(lambda x: x @ a.t() @ b.t(), x)
    between = counted(lambda x: ops.lora_between(x, a, b, torch.tanh, weight=w), x)
    assert between == counted(lambda x: x @ w.t() + (x @ a.t()).tanh() @ b.t(), x)
    assert counted(lambda x: ops.linear4bit(x, q), x) == counted(lambda x: x @ w.t(), x)
    meta = [t.detach().to("meta") for t in (x, w, a, b)]
    with FlopCounterMode(display=False) as shapes_alone:
        ops.lora_linear(*meta)
    assert shapes_alone.get_total_flops() == 2 * M * (N * K + R * K + N * R)


def test_counters_and_operators_in_any_order():
    """The counters import Triton, so that fastpeft does not import them; whichever comes first, all is counted."""
    code = """
import sys, torch, fastpeft
assert "torch.utils.flop_counter" not in sys.modules
x, w, a, b = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
fastpeft.ops.lora_linear(x, w, a, b)
from torch.utils.flop_counter import FlopCounterMode
early, late = (FlopCounterMode(display=False) for _ in range(2))
for counter in (late, early):
    with counter:
        fastpeft.ops.lora_linear(x, w, a, b)
    print(counter.get_total_flops())
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.split() == [str(2 * 2 * (12 + 4 + 3))] * 2
