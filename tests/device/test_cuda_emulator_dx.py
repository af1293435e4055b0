"""The CUDA kernel of dx += dy W for few rows, run thread by thread on the CPU: sums, bounds, races, bytes moved."""

import pytest
import torch

from cases import normal
from emulator.kernels import SCHEDULES
from emulator_cases import HALF, INVALID, Guarded, counts_bytes, exact_weight, shifted
from fastpeft import ops
from fastpeft.ops import Weight4bit
from fastpeft.testing import assert_within_budget

# M, N, K, block_size, double_quant, accumulate, elements past an aligned address, columns between rows beyond N
CASES = {
    "one": (1, 16, 16, 64, True, False, 0, 0),
    "decode": (1, 1030, 64, 64, True, False, 0, 2),
    "two": (2, 37, 128, 32, False, True, 0, 0),
    "seven": (7, 600, 80, 64, True, False, 1, 0),
    "straddled": (8, 77, 144, 64, False, True, 0, 3),
    "sixteen": (16, 129, 208, 128, True, False, 3, 6),
    "thirds": (17, 705, 48, 4096, False, True, 0, 7),
    "many_rows": (33, 65, 512, 64, True, False, 0, 7),
    "full": (64, 515, 160, 256, True, True, 1, 0),
}


def dx_case(name, dtype, quant_type="nf4"):
    M, N, K, block_size, double_quant, accumulate, offset, extra = CASES[name]
    q = ops.quantize_4bit(normal(N, K, std=0.1), quant_type, block_size, double_quant, backend="eager")
    dy = shifted(normal(M, N, dtype=dtype), offset, N + extra)
    return q, dy, normal(M, K, dtype=dtype) if accumulate else None


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_linear4bit_small_dx(kernels, schedule, case, dtype):
    q, dy, before = dx_case(case, dtype)
    M, K = dy.shape[0], q.shape[1]
    dx = Guarded(M, K, dtype, K + 3)
    if before is not None:
        dx.value.copy_(before)
    assert kernels.linear4bit_small_dx(dy, q, dx.value, before is not None) == 0, kernels.message()
    assert dx.only_written_inside()
    start = 0 if before is None else before.double()
    w = ops.dequantize_4bit(q, dtype, backend="eager").double()
    gold = dy.double() @ w + start
    assert_within_budget(dx.value, gold.to(dtype), gold, dtype)


@pytest.mark.parametrize("M", [5, 13, 30, 50])
@pytest.mark.parametrize("spans", [1, 3])
def test_linear4bit_small_dx_is_exact_on_integers(kernels, M, spans):
    N, K = 301, 144
    q = exact_weight(N, K)
    dy = torch.randint(-2, 3, (M, N)).to(torch.float16)
    dx = Guarded(M, K, torch.float16)
    assert kernels.linear4bit_small_dx(dy, q, dx.value, spans=spans) == 0, kernels.message()
    assert torch.equal(dx.value.double(), dy.double() @ ops.dequantize_4bit(q, backend="eager").double())


def test_linear4bit_small_dx_multiplies_the_dequantised_weight(kernels):
    """Rows of the identity pick rows of W: they come out to the bit."""
    q = ops.quantize_4bit(normal(64, 96, std=0.1), backend="eager")
    dx = Guarded(64, 96, torch.bfloat16)
    assert kernels.linear4bit_small_dx(torch.eye(64).bfloat16(), q, dx.value) == 0, kernels.message()
    assert torch.equal(dx.value, ops.dequantize_4bit(q, torch.bfloat16, backend="eager"))


def test_linear4bit_small_dx_reads_no_neighbour(kernels):
    """Beyond N, a row of dy holds infinity, which no weight may meet."""
    q = ops.quantize_4bit(normal(43, 64), backend="eager")
    dy = torch.full((3, 48), torch.inf, dtype=torch.bfloat16)
    dy[:, :43] = 1
    dx = Guarded(3, 64, torch.bfloat16)
    assert kernels.linear4bit_small_dx(dy[:, :43], q, dx.value) == 0, kernels.message()
    assert dx.value.isfinite().all()


@pytest.mark.parametrize("case", ["decode", "full"])
def test_deterministic_dx(kernels, case):
    q, dy, _ = dx_case(case, torch.bfloat16, "fp4")
    results = []
    for name in SCHEDULES:
        kernels.schedule(name)
        dx = torch.empty(dy.shape[0], q.shape[1], dtype=torch.bfloat16)
        assert kernels.linear4bit_small_dx(dy, q, dx) == 0
        results.append(dx)
    kernels.schedule("forward")
    assert all(torch.equal(results[0].view(torch.int16), dx.view(torch.int16)) for dx in results[1:])


def test_spans(kernels):
    """Spans fill what the columns leave idle of the four processors; none has no row."""
    assert kernels.spans("small_dx", 1, 16, 4096) == 1  # too few rows for the warps
    assert kernels.spans("small_dx", 64, 128, 128) == 1  # the sums would cost more than they save
    assert kernels.spans("small_dx", 1, 8192, 512) == 1  # as many columns as processors
    assert kernels.spans("small_dx", 1, 8192, 128) == 4
    assert kernels.spans("small_dx", 1, 8192, 256) == 2


def test_linear4bit_small_dx_refuses(kernels):
    q, dy, _ = dx_case("seven", torch.bfloat16)
    dx = torch.empty(7, 80, dtype=torch.bfloat16)
    unaligned = torch.empty(q.packed.numel() + 1, dtype=torch.uint8)[1:].copy_(q.packed)
    odd = Weight4bit(unaligned, q.scales, q.shape, q.dtype, q.quant_type, q.block_size)
    for dy_given, q_given, dx_given in [
        (dy.float(), q, dx.float()), (dy, q, dx.half()), (dy, q, dx[:, :72]), (dy, odd, dx),
        (dy.repeat(10, 1), q, dx.repeat(10, 1)), (dy[:, :0], q, dx),
    ]:  # fmt: skip
        assert kernels.linear4bit_small_dx(dy_given, q_given, dx_given) == INVALID
    assert kernels.linear4bit_small_dx(dy[:0], q, dx[:0]) == 0


@counts_bytes
@pytest.mark.parametrize("M", [1, 8, 16, 32, 64])
def test_linear4bit_small_dx_moves_its_floor(kernels, M):
    """And where N is split, the spans' sums: written once, read once."""
    for K, spans in ((512, 1), (144, 1), (128, 4)):
        q = ops.quantize_4bit(normal(1024, K), backend="eager")
        dy, dx = normal(M, 1024, dtype=torch.bfloat16), torch.empty(M, K, dtype=torch.bfloat16)
        floor = q.nbytes + dy.nbytes + dx.nbytes + (8 * spans * M * K if spans > 1 else 0)
        assert floor <= kernels.moved(lambda: kernels.linear4bit_small_dx(dy, q, dx, spans=spans)) <= 1.05 * floor  # noqa: B023
