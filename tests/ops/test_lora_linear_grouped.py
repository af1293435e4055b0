"""lora_linear_grouped: an index of factors by row, as segments and as masks; second derivatives; what is refused."""

import importlib

import pytest
import torch

from cases import normal
from fastpeft import ops, testing

grouped = importlib.import_module("fastpeft.ops.lora_linear_grouped")
INDEX = torch.tensor([2, 0, -1, 2, 1, 0])


def tensors(dtype=torch.float32):
    shapes = {
        "x": (6, 9),
        "weight": (7, 9),
        "lora_A": (3, 4, 9),
        "lora_B": (3, 7, 4),
        "bias": (7,),
        "lora_bias": (3, 7),
    }
    return {name: normal(*shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def definition(x, weight, lora_A, lora_B, bias, lora_bias, scale):
    acts = (INDEX >= 0).to(x.dtype).unsqueeze(-1)
    own = INDEX.clamp(min=0)
    update = torch.einsum("mnr,mrk,mk->mn", lora_B[own], lora_A[own], x) + lora_bias[own]
    return x @ weight.t() + bias + scale * acts * update


def run(t, **options):
    return ops.lora_linear_grouped(
        t["x"], t["weight"], t["lora_A"], t["lora_B"], INDEX, t["bias"], t["lora_bias"], scale=0.5, **options
    )


@pytest.fixture(params=["segments", "masked"])
def road(request, monkeypatch):
    """Both roads on a CPU: a GPU and torch.compile take the masks."""
    if request.param == "masked":
        monkeypatch.setattr(
            grouped,
            "_segments",
            lambda x, a, b, rows, bias, *rest: grouped._masked(x, None, a, b, rows, None, bias, *rest),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parity(road, dtype):
    given = tensors(dtype)
    results = []
    for kind in (None, dtype, torch.float64):
        t = {name: v.detach().to(kind or dtype).requires_grad_() for name, v in given.items()}
        y = run(t) if kind is None else definition(**t, scale=0.5)
        torch.manual_seed(3)
        y.backward(torch.randn(y.shape, dtype=torch.float64).to(dtype).to(y.dtype))
        results.append({"y": y.detach()} | {name: v.grad for name, v in t.items()})
    testing.assert_all_within_budget(*results, dtype)


def test_second_derivatives(road):
    t = tensors(torch.float64)
    names = list(t)
    torch.autograd.gradgradcheck(lambda *v: run(dict(zip(names, v, strict=True))), tuple(t.values()))


def test_compiles_to_one_graph():
    t = tensors()
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(t), run(t))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"index": torch.tensor([0, 3])}, ValueError, "index must be below the number of tasks, 3, got 3"),
        ({"index": torch.tensor([0, -2])}, ValueError, "index must be at least -1, got -2"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"index must have x's first dimensions, \[2\]"),
        ({"index": torch.zeros(2)}, TypeError, r"index must be of an integer dtype, got torch\.float32"),
        ({"lora_A": normal(4, 9)}, ValueError, "lora_A must have"),
        ({"lora_B": normal(3, 6, 4)}, ValueError, "lora_B must have shape"),
        ({"lora_bias": normal(7)}, ValueError, "lora_bias must have"),
        ({"x": normal(2, 8)}, ValueError, "x must have shape"),
    ],
)
def test_bad_input(change, error, message):
    t = {**tensors(), "x": normal(2, 9), "index": torch.zeros(2, dtype=torch.int64), **change}
    with pytest.raises(error, match=f"lora_linear_grouped: {message}"):
        ops.lora_linear_grouped(t["x"], t["weight"], t["lora_A"], t["lora_B"], t["index"], None, t["lora_bias"])
