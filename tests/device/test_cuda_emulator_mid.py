"""The CUDA kernel of y = x Wᵀ for up to 512 rows, run thread by thread on the CPU: sums, bounds, races, bytes moved."""

import pytest
import torch

from cases import normal
from emulator.kernels import SCHEDULES
from emulator_cases import HALF, INVALID, Guarded, counts_bytes, exact_weight, shifted
from fastpeft import ops
from fastpeft.ops import Weight4bit
from fastpeft.testing import assert_within_budget

# M, N, K, block_size, double_quant, R, accumulate, columns between rows of x beyond K, spans
CASES = {
    "one": (1, 16, 64, 64, True, 0, False, 0, 1),
    "two_tiles": (129, 40, 128, 64, True, 16, False, 8, 1),
    "odd": (67, 261, 192, 128, False, 5, True, 0, 1),
    "spans": (70, 30, 640, 64, True, 3, False, 0, 3),
    "spans_accumulate": (66, 19, 320, 4096, False, 33, True, 24, 2),
    "ring": (65, 24, 448, 256, True, 0, True, 0, 1),
}


def mid_case(name, dtype, quant_type="nf4"):
    M, N, K, block_size, double_quant, R, accumulate, extra, spans = CASES[name]
    q = ops.quantize_4bit(normal(N, K, std=0.1), quant_type, block_size, double_quant, backend="eager")
    given = {"x": shifted(normal(M, K, dtype=dtype), 0, K + extra), "bias": normal(N)}
    if R:
        given |= {"s": normal(M, R, dtype=dtype), "b": normal(N, R, std=0.2)}
    return q, given, normal(M, N, dtype=dtype) if accumulate else None, spans


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_linear4bit_mid(kernels, schedule, case, dtype):
    q, given, before, spans = mid_case(case, dtype)
    M, N = given["x"].shape[0], q.shape[0]
    y = Guarded(M, N, dtype, N + 5)
    if before is not None:
        y.value.copy_(before)
    assert kernels.linear4bit_mid(given["x"], q, y.value, given.get("s"), given.get("b"), given["bias"], 0.5,
                                  before is not None, spans) == 0, kernels.message()  # fmt: skip
    assert y.only_written_inside()
    w = ops.dequantize_4bit(q, dtype, backend="eager").double()
    gold = given["x"].double() @ w.T + given["bias"].double() + (0 if before is None else before.double())
    if "s" in given:
        gold += 0.5 * given["s"].double() @ given["b"].to(dtype).double().T
    assert_within_budget(y.value, gold.to(dtype), gold, dtype)


@pytest.mark.parametrize("M, N, spans", [(130, 70, 1), (75, 258, 2)])
def test_linear4bit_mid_is_exact_on_integers(kernels, M, N, spans):
    K, R = 256, 19
    q = exact_weight(N, K)
    x, s, b = (torch.randint(-2, 3, shape).to(torch.float16) for shape in ((M, K), (M, R), (N, R)))
    y = Guarded(M, N, torch.float16)
    assert kernels.linear4bit_mid(x, q, y.value, s, b, scale=2.0, spans=spans) == 0, kernels.message()
    gold = x.double() @ ops.dequantize_4bit(q, backend="eager").double().T + 2 * s.double() @ b.double().T
    assert torch.equal(y.value.double(), gold)


def test_linear4bit_mid_multiplies_the_dequantised_weight(kernels):
    """Rows of the identity pick columns of W: they come out to the bit."""
    q = ops.quantize_4bit(normal(33, 128, std=0.1), backend="eager")
    y = Guarded(128, 33, torch.bfloat16)
    assert kernels.linear4bit_mid(torch.eye(128).bfloat16(), q, y.value) == 0, kernels.message()
    assert torch.equal(y.value, ops.dequantize_4bit(q, torch.bfloat16, backend="eager").T)


@pytest.mark.parametrize("case", ["odd", "spans"])
def test_deterministic_mid(kernels, case):
    q, given, _, spans = mid_case(case, torch.bfloat16, "fp4")
    results = []
    for name in SCHEDULES:
        kernels.schedule(name)
        y = torch.empty(given["x"].shape[0], q.shape[0], dtype=torch.bfloat16)
        assert kernels.linear4bit_mid(given["x"], q, y, given["s"], given["b"], spans=spans) == 0
        results.append(y)
    kernels.schedule("forward")
    assert all(torch.equal(results[0].view(torch.int16), y.view(torch.int16)) for y in results[1:])


def test_mid_spans(kernels):
    """Spans fill what the tiles leave idle of the four processors, where K is long enough to pay for their sums."""
    assert kernels.spans("mid", 128, 1024, 8192) == 1  # as many tiles as processors
    assert kernels.spans("mid", 128, 256, 8192) == 4
    assert kernels.spans("mid", 128, 512, 8192) == 2
    assert kernels.spans("mid", 128, 256, 128) == 1


def test_linear4bit_mid_refuses(kernels):
    q, given, _, _ = mid_case("odd", torch.bfloat16)
    x, y = given["x"], torch.empty(67, 261, dtype=torch.bfloat16)
    parts = (q.scales, q.shape, q.dtype, q.quant_type)
    unaligned = torch.empty(q.packed.numel() + 8, dtype=torch.uint8)[8:].copy_(q.packed)
    for x_given, q_given, y_given in [
        (shifted(x, 1), q, y), (shifted(x, 0, 196), q, y), (x.float(), q, y.float()), (x, q, y.half()),
        (x[:, :96], q, y), (x.repeat(8, 1), q, y.repeat(8, 1)), (x, Weight4bit(q.packed, *parts, 32), y),
        (x, Weight4bit(unaligned, *parts, 128), y),
    ]:  # fmt: skip
        assert kernels.linear4bit_mid(x_given, q_given, y_given) == INVALID
    assert kernels.linear4bit_mid(x[:0], q, y[:0]) == 0


@counts_bytes
@pytest.mark.parametrize("M, spans", [(65, 1), (128, 1), (200, 1), (65, 2)])
def test_linear4bit_mid_moves_its_floor(kernels, M, spans):
    """And where K is split, the spans' sums: written once, read once. What tiles share counts once, as in a cache."""
    q = ops.quantize_4bit(normal(272, 1024), backend="eager")
    x, y = normal(M, 1024, dtype=torch.bfloat16), torch.empty(M, 272, dtype=torch.bfloat16)
    floor = q.nbytes + x.nbytes + y.nbytes + (8 * spans * M * 272 if spans > 1 else 0)
    assert floor <= kernels.moved(lambda: kernels.linear4bit_mid(x, q, y, spans=spans)) <= 1.05 * floor
