"""fastpeft.ops.lora_linear: what is wrong with a call, in words."""

import numpy as np
import pytest
import torch

from cases import normal
from fastpeft import dispatch, ops


def good():
    return {"x": normal(4, 6), "weight": normal(5, 6), "lora_A": normal(2, 6), "lora_B": normal(5, 2)}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
        ({"x": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(4, 7)}, ValueError, r"x must have shape \[..., in_features\] = \[..., 6\], got \[4, 7\]"),
        ({"x": torch.ones(4, 6, device="meta")}, ValueError, "x must be on the device of weight, cpu, got meta"),
        ({"x": torch.ones(4, 7), "lora_A": torch.ones(2, 7)}, ValueError, r"weight must have shape \[out_features, in_features\] = \[any, 7\], got \[5, 6\]"),
        ({"x": torch.ones(4, 6, dtype=torch.bfloat16)}, TypeError, "x must have the dtype of weight, torch.float32, outside autocast, got torch.bfloat16"),
        ({"lora_A": torch.ones(2, 7)}, ValueError, r"lora_A must have shape \[rank, in_features\] = \[any, 6\], got \[2, 7\]"),
        ({"lora_A": torch.ones(0, 6), "lora_B": torch.ones(5, 0)}, ValueError, "lora_A must have a rank of at least 1, got 0"),
        ({"lora_A": torch.ones(2, 6, dtype=torch.int32)}, TypeError, "lora_A must be a floating point tensor, got torch.int32"),
        ({"lora_B": torch.ones(5, 3)}, ValueError, r"lora_B must have shape \[out_features, rank\] = \[5, 2\], got \[5, 3\]"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \[out_features\] = \[5\], got \[4\]"),
        ({"lora_bias": torch.ones(5, 1)}, ValueError, r"lora_bias must have shape \[out_features\] = \[5\], got \[5, 1\]"),
        ({"weight": torch.ones(5, 6, device="meta")}, ValueError, "weight must be on the device of x, cpu, got meta"),
        ({"bias": torch.ones(5, device="meta")}, ValueError, "bias must be on the device of x, cpu, got meta"),
        ({"bias": torch.ones(5, dtype=torch.int64)}, TypeError, "bias must be a floating point tensor, got torch.int64"),
        ({"bias": torch.ones(5, dtype=torch.complex64)}, TypeError, "bias must be a floating point tensor, got torch.complex64"),
        ({"lora_bias": torch.ones(5, dtype=torch.bool)}, TypeError, "lora_bias must be a floating point tensor, got torch.bool"),
        ({"lora_bias": torch.ones(5, device="meta")}, ValueError, "lora_bias must be on the device of x, cpu, got meta"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
        ({"dropout": float("nan")}, ValueError, r"dropout must be in \[0, 1\), got nan"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a float, got str"),
        ({"backend": "gpu"}, ValueError, "backend must be one of cpp, cuda, triton, eager or None, got 'gpu'"),
        ({"backend": "cuda"}, ValueError, r"backend must be able to serve .* got 'cuda', which requires an implementation of lora_linear_fwd"),
    ],
)  # fmt: skip
def test_bad_input(change, error, text):
    with pytest.raises(error, match=f"^lora_linear: {text}"):
        ops.lora_linear(**(good() | change))


@pytest.mark.parametrize(
    ("scale", "error", "got"),
    [
        (torch.ones(2), ValueError, r"shape \[2\]"),
        (torch.ones(1), ValueError, r"shape \[1\]"),
        (torch.ones(5, 1), ValueError, r"shape \[5, 1\]"),
        (torch.tensor(True), TypeError, "torch.bool"),
        (torch.tensor(1j), TypeError, "torch.complex64"),
        ("2", TypeError, "str"),
        (None, TypeError, "NoneType"),
        (True, TypeError, "bool"),
        ([2.0], TypeError, "list"),
    ],
)
def test_bad_scale(scale, error, got):
    call = good()
    x, weight, *adapter = call.values()
    calls = {
        "lora_linear": lambda: ops.lora_linear(**call, scale=scale),
        "linear4bit_lora": lambda: ops.linear4bit_lora(x, ops.quantize_4bit(weight), *adapter, scale=scale),
        "lora_adapter": lambda: ops.lora_adapter(x, *adapter, scale=scale),
    }
    for op, run in calls.items():
        with pytest.raises(error, match=f"^{op}: scale must be a real number or a 0-d tensor of one, got {got}$"):
            run()


@pytest.mark.parametrize("scale", [2, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor(2)], ids=repr)
def test_numbers_that_are_no_float(scale):
    call = good()
    torch.testing.assert_close(ops.lora_linear(**call, scale=scale), ops.lora_linear(**call, scale=2.0))


def test_compiled_numbers():
    """Traced with the value fixed, and with it left open from the second one on."""
    call = good()
    compiled = torch.compile(lambda scale: ops.lora_linear(**call, scale=scale), fullgraph=True, backend="aot_eager")
    for scale in (2.0, 3.0, 0.5, 2, 3, 4, torch.tensor(2.0)):
        torch.testing.assert_close(compiled(scale), ops.lora_linear(**call, scale=scale))


def test_backend_that_cannot_serve(monkeypatch):
    double = {name: value.double() for name, value in good().items()}
    with pytest.raises(
        ValueError,
        match=r"^lora_linear: backend must be able to serve torch.float64 on cpu \(one of: eager\), got 'cpp'",
    ):
        ops.lora_linear(**double, backend="cpp")
    monkeypatch.setattr(dispatch, "default", "nonsense")
    with pytest.raises(ValueError, match="got 'nonsense'"):
        ops.lora_linear(**good())
    monkeypatch.setattr(dispatch, "default", "eager")
    torch.testing.assert_close(ops.lora_linear(**good()).shape, torch.Size([4, 5]))
