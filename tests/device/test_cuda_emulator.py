"""The CUDA kernels run thread by thread on the CPU: bits, sums, bounds, races."""

import pytest
import torch

from cases import normal
from emulator.kernels import SCHEDULES
from emulator_cases import HALF, INVALID, SANITIZED, Guarded, counts_bytes, exact_weight, run_sanitized
from fastpeft import ops
from fastpeft.ops import Weight4bit
from fastpeft.testing import assert_within_budget
from fourbit_cases import QUANT_TYPES, bitsandbytes, weight


def same(ours, gold):
    assert torch.equal(ours, gold)
    # bitsandbytes has two zeros, of which its CPU kernels write one.
    assert torch.equal((ours + 0.0).contiguous().view(torch.uint8), (gold + 0.0).contiguous().view(torch.uint8))


# N, K, block_size, columns between rows beyond K, elements past an aligned address
DEQUANTIZE = {
    "round": (64, 512, 64, 0, 0),
    "one": (1, 1, 64, 0, 0),
    "tail": (1, 1003, 32, 0, 0),
    "odd": (7, 33, 64, 0, 0),
    "tiles": (5, 4104, 4096, 0, 0),
    "workspace": (33, 264, 64, 16, 0),
    "workspace_wide": (3, 8 * 300, 128, 64, 0),
    "workspace_narrow": (300, 8, 64, 8, 0),
    "workspace_odd": (9, 50, 32, 3, 0),
    "unaligned": (16, 96, 64, 0, 1),
}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", DEQUANTIZE)
def test_dequantize(kernels, schedule, case, dtype, quant_type, double_quant):
    N, K, block_size, extra, offset = DEQUANTIZE[case]
    q = ops.quantize_4bit(weight((N, K), dtype), quant_type, block_size, double_quant, backend="eager")
    out = Guarded(N, K, dtype, K + extra, offset)
    assert kernels.dequantize_4bit(q, out.value) == 0, kernels.message()
    assert out.only_written_inside()
    same(out.value, ops.dequantize_4bit(q, backend="eager"))


def test_dequantize_unaligned_packed(kernels):
    q = ops.quantize_4bit(weight((16, 96)), backend="eager")
    packed = torch.empty(q.packed.numel() + 1, dtype=torch.uint8)[1:].copy_(q.packed)
    out = Guarded(16, 96, torch.bfloat16)
    shifted = Weight4bit(packed, q.scales, q.shape, q.dtype, q.quant_type, q.block_size)
    assert kernels.dequantize_4bit(shifted, out.value) == 0, kernels.message()
    same(out.value, ops.dequantize_4bit(q, torch.bfloat16, backend="eager"))


@pytest.mark.skipif(bool(SANITIZED), reason="bitsandbytes' own threads are not this check's")
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", [(64, 512), (48, 1088), (1, 1001)])
def test_dequantize_is_bitsandbytes(kernels, shape, quant_type, double_quant):
    functional = bitsandbytes()
    w = normal(*shape, dtype=torch.bfloat16)
    data, state = functional.quantize_4bit(w, quant_type=quant_type, compress_statistics=double_quant)
    out = Guarded(*shape, torch.bfloat16)
    assert kernels.dequantize_4bit(Weight4bit.from_quant_state(data, state), out.value) == 0, kernels.message()
    same(out.value, functional.dequantize_4bit(data, state))


def test_dequantize_nothing(kernels):
    q = Weight4bit(torch.zeros(1, dtype=torch.uint8), [torch.ones(1)], torch.Size((0, 8)), torch.float32, "nf4", 64)
    assert kernels.dequantize_4bit(q, torch.empty(0, 8)) == 0


# M, N, K, block_size, double_quant, R, accumulate
LINEAR = {
    "one": (1, 16, 64, 64, True, 0, False),
    "decode": (1, 48, 1024, 64, True, 8, False),
    "two": (2, 37, 128, 64, False, 5, True),
    "seven": (7, 80, 320, 128, True, 16, False),
    "sixteen": (16, 131, 192, 64, True, 33, False),
    "thirds": (17, 24, 704, 4096, False, 3, True),
    "many_rows": (33, 513, 64, 64, True, 4, False),
    "full": (64, 70, 576, 256, True, 20, True),
    "halves": (3, 33, 96, 64, True, 4, False),
    "short": (9, 50, 256, 32, True, 0, True),
    "short_odd": (29, 17, 352, 32, False, 5, False),
    "short_full": (64, 20, 1120, 32, True, 0, False),
}


def linear_case(name, dtype, quant_type="nf4"):
    M, N, K, block_size, double_quant, R, accumulate = LINEAR[name]
    q = ops.quantize_4bit(normal(N, K, std=0.1), quant_type, block_size, double_quant, backend="eager")
    given = {"x": normal(M, K, dtype=dtype), "bias": normal(N)}
    if R:
        given |= {"s": normal(M, R, dtype=dtype), "b": normal(N, R, std=0.2)}
    return q, given, accumulate


def linear_reference(q, given, before, dtype, scale):
    """In fp64 from the exact weight; and from the weight and result rounded to `dtype`."""
    out = []
    for w in (ops.dequantize_4bit(q, torch.float32, backend="eager"), ops.dequantize_4bit(q, dtype, backend="eager")):
        y = given["x"].double() @ w.double().T + given["bias"].double()
        if "s" in given:
            y += scale * given["s"].double() @ given["b"].double().T
        out.append(y if before is None else y + before.double())
    return out[0], out[1].to(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", LINEAR)
def test_linear4bit_small(kernels, schedule, case, dtype):
    q, given, accumulate = linear_case(case, dtype)
    y = Guarded(given["x"].shape[0], q.shape[0], dtype)
    before = normal(*y.value.shape, dtype=dtype) if accumulate else None
    if accumulate:
        y.value.copy_(before)
    assert kernels.linear4bit_small(given["x"], q, y.value, given.get("s"), given.get("b"), given["bias"], 0.5,
                                    accumulate) == 0, kernels.message()  # fmt: skip
    assert y.only_written_inside()
    gold, peer = linear_reference(q, given, before, dtype, 0.5)
    assert_within_budget(y.value, peer, gold, dtype)


@pytest.mark.parametrize("K", [256, 96])
def test_linear4bit_small_is_exact_on_integers(kernels, K):
    """Every product and sum is exact, so every bit is checked."""
    M, N = 13, 50
    q = exact_weight(N, K)
    x = torch.randint(-2, 3, (M, K)).to(torch.float16)
    y = Guarded(M, N, torch.float16, N + 3)
    assert kernels.linear4bit_small(x, q, y.value) == 0, kernels.message()
    assert torch.equal(y.value.double(), x.double() @ ops.dequantize_4bit(q, backend="eager").double().T)


@pytest.mark.parametrize("case", ["decode", "full"])
def test_deterministic(kernels, case):
    q, given, _ = linear_case(case, torch.bfloat16, "fp4")
    results = []
    for name in SCHEDULES:
        kernels.schedule(name)
        y = torch.empty(given["x"].shape[0], q.shape[0], dtype=torch.bfloat16)
        assert kernels.linear4bit_small(given["x"], q, y, given["s"], given["b"]) == 0
        results.append(y)
    kernels.schedule("forward")
    assert all(torch.equal(results[0].view(torch.int16), y.view(torch.int16)) for y in results[1:])


def test_linear4bit_small_refuses(kernels):
    q, given, _ = linear_case("seven", torch.bfloat16)
    x, y = given["x"], torch.empty(7, 80, dtype=torch.bfloat16)
    unaligned = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    for x_given, q_given, y_given in [
        (unaligned, q, y), (x.float(), q, y.float()), (x[:, :48], q, y), (x.repeat(10, 1), q, y.repeat(10, 1)),
    ]:  # fmt: skip
        assert kernels.linear4bit_small(x_given, q_given, y_given) == INVALID
    assert kernels.linear4bit_small(x[:0], q, y[:0]) == 0


@counts_bytes
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("stride", [512, 528])
def test_dequantize_moves_its_floor(kernels, double_quant, stride):
    q = ops.quantize_4bit(normal(128, 512), double_quant=double_quant, backend="eager")
    out = torch.empty(128, stride, dtype=torch.bfloat16)[:, :512]
    floor = q.nbytes + 2 * out.numel()
    assert floor <= kernels.moved(lambda: kernels.dequantize_4bit(q, out)) <= 1.02 * floor


@counts_bytes
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("M", [1, 8, 16, 32, 64])
def test_linear4bit_small_moves_its_floor(kernels, M, block_size):
    q = ops.quantize_4bit(normal(128, 1024), block_size=block_size, backend="eager")
    x, y = normal(M, 1024, dtype=torch.bfloat16), torch.empty(M, 128, dtype=torch.bfloat16)
    floor = q.nbytes + x.nbytes + y.nbytes
    assert floor <= kernels.moved(lambda: kernels.linear4bit_small(x, q, y)) <= 1.05 * floor


@pytest.mark.skipif(bool(SANITIZED), reason="it is this run")
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_kernels_under_sanitizer(emulator_folder, sanitizer):
    """Each kernel at its edges, one schedule, in a process whose every access is watched."""
    done = run_sanitized(sanitizer, "forward and bfloat16 and not fp4")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
