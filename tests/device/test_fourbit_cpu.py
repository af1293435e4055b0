"""4-bit weights in C++: bytes equal to bitsandbytes', and its products, under every instruction set."""

import pytest
import torch

from cases import normal
from fastpeft import dispatch
from fastpeft.testing import assert_all_within_budget, assert_within_budget
from instruction_sets import isas, running

bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is the reference of the bytes")
pytestmark = pytest.mark.skipif(
    dispatch.unmet("quantize_4bit", "cpp", "cpu", torch.float32) is not None, reason="the extension is not built"
)

TYPES = ["nf4", "fp4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 2, 31, 63, 64, 65, 4096, 5001, 300 * 64 + 7]
SHAPES = [
    (1, 64, 64),
    (3, 40, 96),
    (4, 33, 128),
    (5, 18, 70),
    (2, 21, 33),
    (33, 24, 192),
    (1, 17, 4096),
    (15, 5, 160),
    (49, 37, 320),
    (250, 35, 192),
    (263, 70, 224),
]

FEW_ROWS = [
    (1, 17, 64, 64), (1, 83, 1088, 64), (2, 16, 2112, 64), (3, 130, 1984, 64), (4, 70, 192, 64), (5, 70, 192, 64), (1, 33, 2176, 128),
    (3, 66, 2304, 128), (7, 70, 1536, 512), (8, 20, 768, 256), (9, 20, 768, 256), (2, 3, 8192, 4096), (6, 65, 1024, 1024),
    (9, 65, 1088, 64), (13, 31, 1152, 128), (22, 33, 768, 256), (70, 96, 1536, 512),
]  # fmt: skip


@pytest.fixture(params=isas())
def native(request):
    from fastpeft import _native

    with running(request.param):
        yield _native


def same_values(ours, theirs):
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours[~nan], theirs[~nan])


def values(n, dtype, kind="normal"):
    w = normal(n, dtype=torch.float32, std=0.05) if n else torch.empty(0)
    if kind == "hard" and n > 8:
        w[:64] = 0.0
        places = torch.arange(n // 2, n, 97)
        hard = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-42, -0.0, 1e-39])
        w[places] = hard.repeat(n)[: places.numel()]
    return w.to(dtype)


def quantised(n, quant_type, block_size, double):
    """bitsandbytes' bytes of n random values, and the scales as the operators take them."""
    packed, state = bnb.quantize_4bit(
        values(n, torch.float32), blocksize=block_size, quant_type=quant_type, compress_statistics=double
    )
    scales = [state.absmax]
    if double:
        scales += [state.state2.code, state.state2.absmax, state.offset]
    return packed.reshape(-1), scales, state


@pytest.mark.parametrize("kind", ["normal", "hard"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
def test_quantize(native, quant_type, dtype, kind):
    for n in SIZES[1:]:
        for block_size in (32, 64, 256, 4096):
            w = values(n, dtype, kind)
            packed, absmax = native.quantize_4bit(w, quant_type, block_size)
            float32 = w.float() if dtype is torch.float64 else w  # bitsandbytes refuses fp64
            gold, state = bnb.quantize_4bit(float32, blocksize=block_size, quant_type=quant_type)
            assert torch.equal(packed, gold.reshape(-1)), (n, block_size)
            same_values(absmax, state.absmax)


def test_quantize_ties(native):
    """Values on the midpoints of the code and one float beside them."""
    from bitsandbytes.functional import get_4bit_type

    for quant_type in TYPES:
        code = get_4bit_type(quant_type, device="cpu").sort().values
        middle = (code[1:] + code[:-1]) / 2
        beside = [torch.nextafter(middle, torch.full_like(middle, to)) for to in (-2.0, 2.0)]
        w = torch.cat([code, middle, *beside, torch.zeros(3)])
        assert w.numel() == 64
        packed, _ = native.quantize_4bit(w, quant_type, 64)
        assert torch.equal(packed, bnb.quantize_4bit(w, quant_type=quant_type)[0].reshape(-1))


def test_quantize_absmax(native):
    code = bnb.create_dynamic_map()
    for n in (1, 2, 255, 256, 257, 5000, 70000):
        for std in (1.0, 1e-42, 0.0):
            given = normal(n, std=1.0) * std
            for special in ((), (float("nan"),), (float("inf"), 0.0)):
                given[: len(special)] = torch.tensor(special)[:n]
                codes, scale = native.quantize_absmax(given, code)
                gold, state = bnb.quantize_blockwise(given, code.clone(), blocksize=256)
                assert torch.equal(codes, gold), (n, std, special)
                same_values(scale, state.absmax)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
def test_dequantize(native, quant_type, dtype, double, poisoned):
    for n in SIZES[1:]:
        for block_size in (32, 64, 512, 4096):
            packed, scales, state = quantised(n, quant_type, block_size, double)
            out = torch.empty(n, dtype=dtype)
            native.dequantize_4bit(packed, scales, quant_type, block_size, out)
            state.dtype = dtype
            gold = bnb.dequantize_4bit(packed.view(-1, 1), state).reshape(-1)
            same_values(out, gold)


def exact_weight(packed, absmax, quant_type, block_size, N, K):
    """fp32 [N, K], each value of the code table by the absmax of its block."""
    nibbles = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: N * K].long()
    code = bnb.get_4bit_type(quant_type, device="cpu")
    return (code[nibbles] * absmax.repeat_interleave(block_size)[: N * K]).view(N, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_hard_absmax(native, dtype):
    absmax = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, 1e-40, 1e-38, 3e38, -1.0, 1e-45, 70000.0, 1e-7])
    packed = torch.randint(0, 256, (absmax.numel() * 32,), dtype=torch.uint8)
    for quant_type in TYPES:
        out = torch.empty(absmax.numel(), 64, dtype=dtype)
        native.dequantize_4bit(packed, [absmax], quant_type, 64, out)
        same_values(out, exact_weight(packed, absmax, quant_type, 64, absmax.numel(), 64).to(dtype))


def test_empty(native):
    packed, absmax = native.quantize_4bit(torch.empty(0), "nf4", 64)
    assert packed.numel() == absmax.numel() == 0
    native.dequantize_4bit(packed, [absmax], "nf4", 64, torch.empty(0, 5))
    codes, scale = native.quantize_absmax(torch.empty(0), bnb.create_dynamic_map())
    assert codes.numel() == scale.numel() == 0


def reference(given, lora, w, dtype):
    """y, dx, da, db and the bias gradient through autograd, all in `dtype`."""
    leaf = {k: v.detach().to(dtype).requires_grad_() for k, v in given.items() if k != "dy"}
    y = torch.nn.functional.linear(leaf["x"], w.to(dtype), leaf["bias"])
    if lora:
        y = y + 0.5 * (leaf["x"] @ leaf["a"].T @ leaf["b"].T)
    names = ["x", "a", "b", "bias"] if lora else ["x", "bias"]
    grads = torch.autograd.grad(y, [leaf[name] for name in names], given["dy"].to(dtype))
    return {"y": y.detach()} | {"d" + name: grad for name, grad in zip(names, grads, strict=True)}


def check_linear(native, shape, quant_type, block_size, double, dtype, lora):
    M, N, K = shape
    packed, scales, state = quantised(N * K, quant_type, block_size, double)
    w = bnb.dequantize_4bit(packed.view(-1, 1), state).reshape(N, K)
    given = {"x": normal(M, K, dtype=dtype), "bias": normal(N, dtype=dtype), "dy": normal(M, N, dtype=dtype)}
    given |= {"a": normal(6, K, std=0.1), "b": normal(N, 6, std=0.1)}
    a, b = (given["a"], given["b"]) if lora else (None, None)
    weight = (packed, scales, quant_type, block_size)
    y, s = native.linear4bit_fwd(given["x"], *weight, N, a, b, given["bias"], None, 0.5, 0.0, None)
    needs = (True, lora, lora, True)
    dx, da, db, dbias = native.linear4bit_bwd(given["dy"], given["x"], *weight, K, a, b, s, 0.5, 0.0, None, *needs)
    ours = {"y": y, "dx": dx, "dbias": dbias} | ({"da": da, "db": db} if lora else {})
    rounded = w.to(dtype)
    assert_all_within_budget(
        ours, reference(given, lora, rounded, dtype), reference(given, lora, w, torch.float64), dtype
    )


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
def test_linear(native, quant_type, dtype, lora, poisoned):
    for shape in SHAPES:
        for block_size, double in ((32, False), (64, True), (128, True)):
            check_linear(native, shape, quant_type, block_size, double, dtype, lora)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_few_rows(native, dtype, double, poisoned):
    """With sums of more than one block, or of less than one, over long rows and short ones."""
    for M, N, K, block_size in FEW_ROWS:
        for quant_type in TYPES:
            check_linear(native, (M, N, K), quant_type, block_size, double, dtype, False)


def few_rows(native, x, absmax):
    """y, the weight in the dtype of x, and the exact y."""
    N, K = absmax.numel() * 64 // x.shape[1], x.shape[1]
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    w = exact_weight(packed, absmax, "nf4", 64, N, K)
    y, _ = native.linear4bit_fwd(x, packed, [absmax], "nf4", 64, N, None, None, None, None, 1.0, 0.0, None)
    return y, w.to(x.dtype), x.double() @ w.double().T


@pytest.mark.parametrize("M", [1, 2, 3, 11])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_range(native, dtype, M):
    """Values that differ much, or that products of integers do not hold."""
    absmax = torch.rand(40 * 3, generator=torch.Generator().manual_seed(0)) + 0.1
    wide_range = normal(M, 192, dtype=dtype)
    wide_range[:, ::7] *= 1000
    zeros, tiny, lone = torch.zeros(M, 192, dtype=dtype), normal(M, 192, dtype=dtype), torch.zeros(M, 192, dtype=dtype)
    tiny *= 2.0 ** (-10 if dtype == torch.float16 else -110)
    lone[0, 70] = -1.9921875  # all bits of a significand
    huge = torch.zeros(M, 192, dtype=dtype)
    huge[0, 3] = 6e4 if dtype == torch.float16 else 2e34
    for x in (wide_range, zeros, tiny, lone, huge):
        y, w, gold = few_rows(native, x, absmax)
        assert_within_budget(y, torch.nn.functional.linear(x, w), gold, dtype)


@pytest.mark.parametrize("block_size", [64, 128, 1024])
@pytest.mark.parametrize("M", [1, 4, 16, 64])
def test_linear_of_one_sign(native, M, block_size):
    """Rounding errors of the weights must not add up: what is common to all outputs is small against what is random."""
    N, K = 256, 4096
    packed, scales, _ = quantised(N * K, "nf4", block_size, False)
    w = exact_weight(packed, scales[0], "nf4", block_size, N, K)
    x = (1 + 0.1 * normal(M, K)).to(torch.bfloat16)
    y, _ = native.linear4bit_fwd(x, packed, scales, "nf4", block_size, N, None, None, None, None, 1.0, 0.0, None)
    gold = x.double() @ w.double().T
    peer = torch.nn.functional.linear(x, w.to(torch.bfloat16)).double()
    error = (y.double() - gold).mean().abs()
    assert error < 0.6 * (peer - gold).std() + 4 * (peer - gold).std() / N**0.5


@pytest.mark.parametrize("M", [1, 2, 3, 11])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_not_finite(native, dtype, M):
    absmax = torch.rand(40 * 3, generator=torch.Generator().manual_seed(0)) + 0.1
    for value in (float("inf"), float("-inf"), float("nan")):
        x = normal(M, 192, dtype=dtype)
        x[-1, 100] = value
        y, _, gold = few_rows(native, x, absmax)
        assert torch.equal(y.isnan(), gold.isnan())
        assert torch.equal(y[y.isinf()].double(), gold[gold.isinf()])
        broken = absmax.clone()
        broken[5] = value
        y, _, gold = few_rows(native, normal(M, 192, dtype=dtype), broken)
        assert torch.equal(y.isfinite(), gold.isfinite())


@pytest.fixture(params=["gemv", "fused", "panels"])
def path(native, request):
    native.set_fourbit_path(request.param)
    yield request.param
    native.set_fourbit_path("auto")


def test_linear_by_every_path(native, path, poisoned):
    """Also with more rows, or fewer, than it is chosen for; with one that cannot serve, an error and no other path."""
    absmax = torch.rand(72 * 3, generator=torch.Generator().manual_seed(0)) + 0.1
    pairs = native.build_info()["isa"] in ("avx512_bf16", "amx_bf16")
    for dtype in DTYPES:
        for M in (1, 5, 20, 70):
            if path == "fused" and not (pairs and dtype is torch.bfloat16):
                with pytest.raises(
                    RuntimeError, match=r"set_fourbit_path: the path of a forward pass must serve .*'fused'"
                ):
                    few_rows(native, normal(M, 192, dtype=dtype), absmax)
                continue
            x = normal(M, 192, dtype=dtype)
            y, w, gold = few_rows(native, x, absmax)
            assert native.linear4bit_path(M, 192, str(dtype).removeprefix("torch."), 64) == path
            assert_within_budget(y, torch.nn.functional.linear(x, w), gold, dtype)
            if path != "gemv":
                check_linear(native, (M, 70, 192), "nf4", 64, True, dtype, False)
    with pytest.raises(ValueError, match="set_fourbit_path: name must be auto, gemv, fused or panels, got 'tiles'"):
        native.set_fourbit_path("tiles")


def test_gemv_has_no_backward(native):
    packed, scales, _ = quantised(64 * 64, "nf4", 64, False)
    native.set_fourbit_path("gemv")
    try:
        with pytest.raises(RuntimeError, match=r"the path of a backward pass must serve its shape and dtype .*'gemv'"):
            dy, nothing = torch.ones(2, 64), (None, None, torch.empty(0), 1.0, 0.0, None)
            native.linear4bit_bwd(dy, dy, packed, scales, "nf4", 64, 64, *nothing, True, False, False, False)
    finally:
        native.set_fourbit_path("auto")


def test_linear_empty(native, poisoned):
    packed, scales, _ = quantised(96 * 64, "nf4", 64, True)
    weight = (packed, scales, "nf4", 64)
    x = torch.empty(0, 64, dtype=torch.bfloat16)
    y, s = native.linear4bit_fwd(x, *weight, 96, None, None, None, None, 1.0, 0.0, None)
    assert y.shape == (0, 96) and s.shape == (0,)
    dx, *_ = native.linear4bit_bwd(y, x, *weight, 64, None, None, s, 1.0, 0.0, None, True, False, False, True)
    assert dx.shape == (0, 64)
    nothing = (torch.empty(0, dtype=torch.uint8), [torch.empty(0)], "nf4", 64)
    for M in (1, 8, 20):
        x = torch.empty(M, 0, dtype=torch.bfloat16)
        y, _ = native.linear4bit_fwd(x, *nothing, 96, None, None, None, None, 1.0, 0.0, None)
        assert torch.equal(y, torch.zeros(M, 96, dtype=torch.bfloat16))
        x, dy = torch.ones(M, 64, dtype=torch.bfloat16), torch.empty(M, 0, dtype=torch.bfloat16)
        dx, *_ = native.linear4bit_bwd(dy, x, *nothing, 64, None, None, s, 1.0, 0.0, None, True, False, False, False)
        assert torch.equal(dx, torch.zeros(M, 64, dtype=torch.bfloat16))


def test_linear_fuzz(native):
    """Random bytes and strided rows: nothing is read out of place, and every byte is a weight."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(40):
        M, N, K = (int(torch.randint(1, high, (1,), generator=generator)) for high in (24, 70, 200))
        block_size, quant_type, dtype = (32, 64, 128)[trial % 3], TYPES[trial % 2], DTYPES[trial % 3]
        if trial % 2:
            K = K // 64 * 64 + 64
        n = N * K
        packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
        absmax = torch.rand(-(n // -block_size), generator=generator)
        w = exact_weight(packed, absmax, quant_type, block_size, N, K)
        x = torch.randn(M, K + 3, generator=generator).to(dtype)[:, :K]
        y, _ = native.linear4bit_fwd(
            x, packed, [absmax], quant_type, block_size, N, None, None, None, None, 1.0, 0.0, None
        )
        peer = torch.nn.functional.linear(x, w.to(dtype))
        assert_within_budget(y, peer, x.double() @ w.double().T, dtype)
