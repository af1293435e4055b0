"""The gradients of conv_shrink for a and x, against torch's own through the definition."""

import pytest
import torch
from test_conv_shrink import operands, served

from conv_cases import CASES, LAST, vendor
from fastpeft import ops
from fastpeft.testing import assert_within_budget

OP = "conv_grad_a"


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("backend", "case", "dtype"), served(OP))
def test_backward(backend, case, dtype, p, poisoned):
    x, a = operands(case, dtype)
    call = {"p": p, "seed": torch.tensor(2**40 + 7) if p else None, **case.options}
    ds = torch.randn(ops.conv_shrink(x, a, backend="eager", **call).shape).to(dtype)
    start = torch.randn(x.shape).to(dtype).contiguous(memory_format=LAST[x.dim()])

    def gradients(backend, work):
        dx = start.to(work, copy=True)
        da = ops.conv_grad_a(
            x.to(work), ds.to(work), a.to(a.dtype if work == dtype else work), dx, backend=backend, **call
        )
        return {"da": da, "dx": dx}

    ours, gold = gradients(backend, dtype), gradients("eager", torch.float64)
    # The vendor sums in an order of its own.
    peer = vendor(x, a, ds, start, **call) if backend == "cpp" else gradients("eager", dtype)
    assert ours["da"].dtype == torch.float32
    for name in gold:
        assert_within_budget(ours[name], peer[name], gold[name], dtype, name)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_reference(case, p):
    """The formulas of the reference are those that torch derives from a convolution of drop(x)."""
    x, a = operands(case, torch.float64)
    call = {"p": p, "seed": torch.tensor(9) if p else None, **case.options}
    a, dx = a.double(), torch.zeros_like(x.contiguous(memory_format=LAST[x.dim()]))
    ds = torch.randn_like(vendor(x, a, **call))
    gold = vendor(x, a, ds, dx, **call)
    da = ops.conv_grad_a(x, ds, a, dx, backend="eager", **call)
    torch.testing.assert_close({"da": da, "dx": dx}, gold)


@pytest.mark.parametrize(("backend", "case", "dtype"), [c for c in served(OP) if "-groups-torch.float32" in c.id])
def test_deterministic(backend, case, dtype):
    x, a = operands(case, dtype)
    ds = torch.randn(ops.conv_shrink(x, a, backend="eager", **case.options).shape)

    def once():
        dx = torch.zeros_like(x.contiguous(memory_format=LAST[x.dim()]))
        return dx, ops.conv_grad_a(x, ds, a, dx, 0.2, torch.tensor(5), backend=backend, **case.options)

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_registration(backend):
    x, dx = torch.randn(1, 2, 4, 4), torch.zeros(1, 4, 4, 2).movedim(-1, 1)
    args = (
        x,
        torch.randn(16, 2),
        torch.randn(2, 2, 3, 3),
        dx,
        [1, 1],
        [1, 1],
        [1, 1],
        1,
        0.5,
        torch.tensor(1),
        True,
        True,
    )
    torch.library.opcheck(torch.ops.fastpeft.conv_grad_a.default, (*args, backend))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"ds": torch.ones(8, 2)}, ValueError, r"ds must have shape \[N · out, groups · R\] = \[9, 2\], got \[8, 2\]"),
        ({"ds": torch.ones(9, 2).half()}, TypeError, "ds must have the dtype of x, torch.float32, got torch.float16"),
        (
            {"dx": torch.ones(1, 4, 5, 4)},
            ValueError,
            r"dx must have the shape of x, \[1, 4, 5, 5\], got \[1, 4, 5, 4\]",
        ),
        ({"dx": torch.ones(1, 4, 5, 5)}, ValueError, "dx must be contiguous in channels-last format, got strides"),
    ],
)
def test_bad_input(change, error, text):
    call = {"x": torch.ones(1, 4, 5, 5), "ds": torch.ones(9, 2), "a": torch.ones(2, 4, 3, 3), "dx": None}
    with pytest.raises(error, match=f"^conv_grad_a: {text}"):
        ops.conv_grad_a(**{**call, **change})
