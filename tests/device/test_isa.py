"""Every instruction set that this processor runs: the same products, and conversions to the bit."""

import pytest
import torch

from cases import FLOATS, Case, linear_call, normal, wide
from fastpeft import dispatch, ops
from fastpeft.testing import assert_all_within_budget
from instruction_sets import isas, running

pytestmark = pytest.mark.skipif(
    dispatch.unmet("lora_shrink", "cpp", "cpu", torch.float32) is not None, reason="the extension is not built"
)


@pytest.fixture(params=isas())
def isa(request):
    with running(request.param):
        yield request.param


# On either side of what a block, a vector or a tile takes: of rows, columns and ranks.
CASES = [
    Case(101, 300, 77, 24, "ragged"),
    Case(12, 512, 64, 8, "round"),
    Case(97, 31, 300, 1, "thin"),
    Case(17, 33, 40, 16, "tile"),
    Case(200, 64, 97, 33, "ranks past two tiles"),
    Case(31, 258, 16, 65, "ranks past four"),
    Case(35, 70, 90, 256, "wide"),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(isa, case, dtype, poisoned):
    given = {
        "x": normal(case.M, case.K, dtype=dtype),
        "weight": normal(case.N, case.K, dtype=dtype, std=0.1),
        "lora_A": normal(case.R, case.K, std=0.1),
        "lora_B": normal(case.N, case.R),
        "bias": normal(case.N, dtype=dtype),
        "dy": normal(case.M, case.N, dtype=dtype),
    }
    ours = linear_call(given, "cpp", scale=0.7, p=0.1, seed=1)
    peer = linear_call(given, "eager", scale=0.7, p=0.1, seed=1)
    gold = linear_call(wide(given, torch.float64), "eager", scale=0.7, p=0.1, seed=1)
    assert_all_within_budget(ours, peer, gold, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rank", [1, 3, 9, 17])
def test_nothing_is_read_past_the_rank(isa, rank, dtype):
    """Scratch memory holds what was freed last: NaN past the last column of a row must not reach a product."""
    for _ in range(10):
        s, b = normal(33, rank, dtype=dtype), normal(64, rank)
        freed = [torch.full((floats,), torch.nan) for floats in (33 * 16, 33 * 32, 1024) for _ in range(4)]
        del freed
        assert ops.lora_expand(s, b, backend="cpp").isfinite().all()


def same_bits(ours, gold):
    # The payload of a NaN is free; that it is one is not.
    nan = gold.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours[~nan].view(torch.int16), gold[~nan].view(torch.int16))


def flush_denormals(isa, gold, exact=None):
    """VDPBF16PS takes denormals for zero, in torch's own product of bf16 matrices too."""
    if isa in ("avx512_bf16", "amx_bf16") and gold.dtype == torch.bfloat16:
        gold[(gold if exact is None else exact).abs() < 2.0**-126] = 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_survives(isa, dtype):
    """All 65536 values of a 16-bit dtype through fp32 and back."""
    s = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
    y = ops.lora_expand(s, torch.ones(1, 1), backend="cpp")
    gold = s.clone()
    gold[gold == 0] = 0.0  # the sum starts at +0
    flush_denormals(isa, gold)
    same_bits(y, gold)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding(isa, dtype):
    """fp32 to 16 bits, to nearest even: ties, denormals, the largest values, infinities, NaN."""
    edges = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    bits = edges[edges.isfinite() & (edges != 0)].view(torch.int32)
    half = 1 << (15 if dtype is torch.bfloat16 else 12)
    values = torch.cat([bits + offset for offset in (0, 1, half - 1, half, half + 1, -1)]).view(torch.float32)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.99, 65520.0, 3.4e38, 1e-45, 2.0**-25, 2.0**-24])
    b = torch.cat([values, special]).view(-1, 1)
    y = ops.lora_expand(torch.ones(1, 1, dtype=dtype), b, backend="cpp")
    gold = b[:, 0].to(dtype)
    flush_denormals(isa, gold, b[:, 0])
    same_bits(y[0], gold)
