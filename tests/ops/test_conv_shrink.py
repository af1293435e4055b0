"""s = conv(drop(x), a), by the vendor around csrc's dropout and by Triton, against the unfold formula."""

import pytest
import torch

from cases import unless_served
from conv_cases import CASES, LAST, ConvCase, make, vendor
from fastpeft import ops
from fastpeft.testing import assert_within_budget

OP = "conv_shrink"
DTYPES = {"cpp": [torch.float32, torch.bfloat16, torch.float16], "triton": [torch.float32, torch.float16]}


def served(op=OP):
    return [
        pytest.param(backend, case, dtype, marks=unless_served(op, backend, dtype), id=f"{backend}-{case}-{dtype}")
        for backend, dtypes in DTYPES.items()
        # A program of Triton's interpreter costs milliseconds.
        for case in (CASES if backend == "cpp" else CASES[1:5])
        for dtype in dtypes
        if case.why == "strided" or dtype != torch.float16
    ]


def operands(case, dtype):
    x, weight, a, *_ = make(case, dtype)
    return x, a.view(case.R, *weight.shape[1:])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("backend", "case", "dtype"), served())
def test_forward(backend, case, dtype, p, poisoned):
    x, a = operands(case, dtype)
    call = {"p": p, "seed": torch.tensor(2**40 + 7) if p else None, **case.options}
    ours = ops.conv_shrink(x, a, backend=backend, **call)
    # The vendor sums in an order of its own.
    peer = vendor(x, a, **call) if backend == "cpp" else ops.conv_shrink(x, a, backend="eager", **call)
    gold = ops.conv_shrink(x.double(), a.double(), backend="eager", **call)
    assert ours.dtype == dtype
    assert_within_budget(ours, peer, gold, dtype)
    last = ops.conv_shrink(x.contiguous(memory_format=LAST[x.dim()]), a, backend=backend, **call)
    assert torch.equal(last, ours)


def test_reference_is_torchs_convolution():
    case = CASES[1]
    x, a = operands(case, torch.float64)
    s = ops.conv_shrink(x, a, backend="eager", **case.options)
    torch.testing.assert_close(s, vendor(x, a, **case.options))


@pytest.mark.parametrize("backend", ["eager", "cpp", "triton"])
def test_empty_batch(backend):
    if unless_served(OP, backend, torch.float32):
        pytest.skip(f"{backend} is not here")
    x, a = torch.empty(0, 4, 5, 5), torch.randn(2, 4, 3, 3)
    assert ops.conv_shrink(x, a, 0.1, torch.tensor(1), backend=backend).shape == (0, 2)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_registration(backend):
    args = (torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3), [1, 1], [1, 1], [1, 1], 1, 0.5, torch.tensor(1), backend)
    torch.library.opcheck(torch.ops.fastpeft.conv_shrink.default, args)


@pytest.mark.cpp
def test_pieces(monkeypatch):
    """A mask drawn a few images at a time is the mask of the whole."""
    native = pytest.importorskip("fastpeft._native_conv")
    x, a = operands(ConvCase("", (5, 4), 6, 4, 2, (3, 3)), torch.float32)
    whole = ops.conv_shrink(x, a, 0.4, torch.tensor(3), backend="cpp")
    monkeypatch.setattr(native, "_PIECE", 1)
    torch.testing.assert_close(ops.conv_shrink(x, a, 0.4, torch.tensor(3), backend="cpp"), whole)


def test_bytes():
    """Of images [8, 256, 64, 64] in bf16 the adapter's forward moves 52 MB; unfolded they are 151 MB alone."""
    pytest.importorskip("triton", reason="the Triton backend is not installed")
    from fastpeft.kernels._launch import count_launches
    from fastpeft.kernels.conv_shrink import conv_shrink
    from fastpeft.kernels.lora_expand import lora_expand_add

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, device="meta", dtype=dtype)

    x, a = meta(8, 256, 64, 64).contiguous(memory_format=torch.channels_last), meta(16, 256, 3, 3, dtype=torch.float32)
    with count_launches() as launches:
        s = conv_shrink(x, a, [1, 1], [1, 1], [1, 1], 1, 0.1, meta(1, dtype=torch.int64))
        lora_expand_add(meta(s.shape[0], 256), s, meta(256, 16, dtype=torch.float32), 2.0)
    moved = sum(each.read_bytes + each.written_bytes + each.scratch_bytes for each in launches)
    assert s.shape == (8 * 64 * 64, 16)
    assert 50e6 < moved <= 60e6
    assert [each.name for each in launches] == ["pack_a", "conv_shrink", "lora_expand_add"]


X, A = torch.ones(1, 4, 5, 5), torch.ones(2, 4, 3, 3)


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        ((X[0], A), {}, ValueError, r"x must have shape \[N, C, \*in\] of 4 or 5 dimensions, got \[4, 5, 5\]"),
        ((X, A[:, :3]), {}, ValueError, r"a must have shape \[R, C / groups, \*kernel\] = \[any, 4, any × 2\]"),
        ((X, A), {"groups": 3}, ValueError, "groups must divide the 4 channels of x, got 3"),
        ((X, A), {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ((X, A), {"padding": (1, 1, 1)}, ValueError, r"padding must have one value or 2, got \(1, 1, 1\)"),
        ((X, A), {"dilation": 1.0}, TypeError, "dilation must be an int or a tuple of ints, got 1.0"),
        ((X, A), {"dilation": 3}, ValueError, r"x must hold a window of the kernel \[3, 3\], got \[5, 5\]"),
        ((X, A, 0.5), {}, ValueError, "seed must be given where p > 0, got None"),
    ],
)
def test_bad_input(args, options, error, text):
    with pytest.raises(error, match=f"^conv_shrink: {text}"):
        ops.conv_shrink(*args, **options)
