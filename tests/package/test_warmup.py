"""`fastpeft.warmup` where there is nothing to compile, and what it refuses. What it compiles: tests/device/test_plans.py."""

import pytest
import torch

import fastpeft


@pytest.mark.parametrize(("tokens", "said"), [(0, "tokens must be positive, got 0"), ((), "tokens or inputs must be")])
def test_bad_input(tokens, said):
    with pytest.raises(ValueError, match=f"^warmup: {said}"):
        fastpeft.warmup(torch.nn.Linear(4, 4), tokens)


def test_nothing_to_compile():
    found = fastpeft.warmup(fastpeft.LoRALinear(8, 8), 16)
    assert (found.kernels, found.left) == ((), {})
    assert str(found) == "fastpeft: nothing to compile, no parameter of the model is on a CUDA device"
