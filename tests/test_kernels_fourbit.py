"""The 4-bit Triton launchers under the interpreter: bytes of the reference, products within the error budget of fp64."""

import importlib
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend is not installed")

from fastpeft.kernels import _common, _fourbit_cost, linear4bit, linear4bit_small
from fastpeft.kernels import dequantize_4bit as dequantize
from fastpeft.kernels import quantize_4bit as quantize

from fastpeft.reference import dequantize_4bit as eager_dequantize
from fastpeft.reference import linear4bit as eager
from fastpeft.reference import quantize_4bit as eager_quantize
from fastpeft.reference.lora_linear import lora_linear_bwd, lora_linear_fwd
from fastpeft.testing import assert_all_within_budget, assert_within_budget

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where a test divides by zero on purpose
    pytest.mark.skipif(
        "Interpreted" not in type(_common._reduce_splits_kernel).__name__,
        reason="TRITON_INTERPRET=1 was not set when triton was imported",
    ),
]

NF4_64 = ("nf4", 64)
FORMATS = [(quant_type, size, double) for quant_type, size in (NF4_64, ("fp4", 32)) for double in (True, False)]
# An 8-bit code of 256 ascending values; the real one is bitsandbytes' and comes with the weight.
CODE = torch.cat([-torch.logspace(-6, 0, 127).flip(0), torch.zeros(1), torch.logspace(-6, 0, 128)])


def scales_of(absmax, double):
    if not double:
        return [absmax]
    offset = absmax.mean()
    codes, scale = eager_quantize.quantize_absmax(absmax - offset, CODE)
    return [codes, CODE, scale, offset]


def weight(N, K, quant_type="nf4", block_size=64, double=True, dtype=torch.float32):
    """(packed, scales, quant_type, block_size) of a random weight, and the weight they stand for, in `dtype`."""
    packed, absmax = eager_quantize.quantize_4bit(torch.randn(N, K), quant_type, block_size)
    scales = scales_of(absmax, double)
    return (packed, scales, quant_type, block_size), dequantized(packed, scales, quant_type, block_size, N, K, dtype)


def dequantized(packed, scales, quant_type, block_size, N, K, dtype):
    w = torch.empty(N, K, dtype=dtype)
    eager_dequantize.dequantize_4bit(packed, scales, quant_type, block_size, w)
    return w


@pytest.fixture(params=[torch.float32, torch.float16], ids=["fp32", "fp16"])
def dtype(request):
    return request.param


# Weights whose n ends within a byte, within a block, or fills a tile to the last element.
SHAPES = [(64, 64), (7, 33), (1, 1), (3, 1667), (40, 104)]


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_and_dequantize(quant_type, block_size, dtype):
    """The bytes, the scales and every value, bit for bit."""
    for shape in SHAPES:
        w = torch.randn(shape).to(dtype)
        packed, absmax = quantize.quantize_4bit(w, quant_type, block_size)
        want_packed, want_absmax = eager_quantize.quantize_4bit(w, quant_type, block_size)
        assert torch.equal(packed, want_packed)
        assert torch.equal(absmax, want_absmax)
        for double in (False, True):
            scales = scales_of(absmax, double)
            out = torch.empty(shape, dtype=dtype)
            dequantize.dequantize_4bit(packed, scales, quant_type, block_size, out)
            want = dequantized(packed, scales, quant_type, block_size, *shape, dtype)
            assert np.array_equal(out.numpy().view(np.uint8), want.numpy().view(np.uint8)), "a sign of zero counts too"


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_hard_values(quant_type):
    """Ties, zeros of both signs, blocks of zeros, denormals, infinities and NaN, in whole blocks and in the last."""
    values = torch.tensor(sorted(eager_quantize.CODES[quant_type]))
    ties = ((values[1:] + values[:-1]) / 2).repeat(9)[:133].clone()
    ties[::32] = 1.0
    for w in (ties, torch.zeros(70), -torch.zeros(64), torch.randn(133) * 1e-41, torch.randn(133) * 1e-37):
        packed, absmax = quantize.quantize_4bit(w, quant_type, 32)
        want, want_absmax = eager_quantize.quantize_4bit(w, quant_type, 32)
        assert torch.equal(packed, want) and torch.equal(absmax, want_absmax)
    for poison in (float("nan"), float("inf"), -float("inf")):
        for place in (3, 132):
            w = torch.randn(133)
            w[place] = poison
            packed, absmax = quantize.quantize_4bit(w, quant_type, 32)
            want, want_absmax = eager_quantize.quantize_4bit(w, quant_type, 32)
            assert torch.equal(packed, want)
            torch.testing.assert_close(absmax, want_absmax, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [1, 256, 700])
def test_quantize_absmax(n):
    for values in (torch.randn(n), torch.zeros(n), torch.randn(n) * 1e-41, CODE.repeat(3)[:n].clone()):
        codes, scale = quantize.quantize_absmax(values, CODE)
        want, want_scale = eager_quantize.quantize_absmax(values, CODE)
        assert torch.equal(codes, want) and torch.equal(scale, want_scale)


def test_bytes_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    w = torch.randn(33, 65)
    for quant_type in ("nf4", "fp4"):
        data, state = functional.quantize_4bit(w, quant_type=quant_type, compress_statistics=True)
        packed, absmax = quantize.quantize_4bit(w, quant_type, 64)
        offset = absmax.mean()
        codes, scale = quantize.quantize_absmax(absmax - offset, state.state2.code)
        assert torch.equal(packed, data.view(-1))
        assert torch.equal(codes, state.absmax) and torch.equal(scale, state.state2.absmax)
        out = torch.empty_like(w)
        dequantize.dequantize_4bit(packed, [codes, state.state2.code, scale, offset], quant_type, 64, out)
        assert torch.equal(out, functional.dequantize_4bit(data, state))


def rounded_twice(code, scale, offset):
    """Whether code * scale + offset differs from its fused form, in fp32."""
    exact = (code.double() * scale.double() + offset.double()).float()
    return (code * scale + offset) != exact


def test_absmax_is_rounded_twice():
    """Scales chosen so that a fused multiply-add would give other bits."""
    scale, offset = torch.rand(4096) + 1, torch.rand(())
    odd = rounded_twice(CODE[200], scale, offset).nonzero()[0, 0]
    scales = [torch.tensor([200], dtype=torch.uint8), CODE, scale[odd].view(1), offset]
    out = torch.empty(2)
    dequantize.dequantize_4bit(torch.tensor([0xFF], dtype=torch.uint8), scales, "nf4", 64, out)
    assert out[0] == CODE[200] * scale[odd] + offset


# (M, N, K, R): R = 0 has no adapter.
CASES = [
    pytest.param(16, 64, 128, 16, id="round"),
    pytest.param(1, 70, 96, 3, id="row"),
    pytest.param(5, 33, 192, 0, id="plain"),
    pytest.param(33, 24, 320, 70, id="rank70"),
    pytest.param(0, 24, 64, 4, id="empty"),
    pytest.param(64, 40, 1056, 4, id="splits"),
]


class Case:
    """Operands; x and dy have a longer row stride than they need, a and b are transposed views of fp32."""

    def __init__(self, M, N, K, R, dtype, p=0.0, format=(*NF4_64, True), lora_bias=True):
        self.packed, self.w = weight(N, K, *format, dtype=dtype)
        self.x = torch.randn(M, K + 8).to(dtype)[:, :K]
        self.dy = torch.randn(M, N + 8).to(dtype)[:, :N]
        self.a = (torch.randn(K, R) / K**0.5).t() if R else None
        self.b = (torch.randn(R, N) / R**0.5).t() if R else None
        self.bias, self.lora_bias = torch.randn(N).to(dtype), torch.randn(N) if R and lora_bias else None
        self.s = torch.randn(M, R).to(dtype) if R else self.x.new_empty(0)
        self.p, self.seed, self.dtype = p, torch.tensor([2**40 + 7]) if p else None, dtype

    def wide(self, *names):
        """Operands in fp64 after the roundings that every backend makes."""
        values = (getattr(self, name) for name in names)
        return [None if v is None else v.to(self.dtype).double() for v in values]


@pytest.mark.parametrize("M, N, K, R", CASES)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f[0]}-{f[1]}-{'double' if f[2] else 'plain'}")
def test_small(M, N, K, R, format, dtype):
    c = Case(M, N, K, R, dtype, format=format)
    b = c.b if R else None
    y = linear4bit_small.linear4bit_small(c.x, *c.packed, N, c.s, b, c.bias, c.lora_bias, 0.5)

    def forward(x, w, s, b, bias, lora_bias):
        y = x @ w.T + bias
        return y + 0.5 * (s @ b.T + lora_bias) if R else y

    names = ("x", "w", "s", "b", "bias", "lora_bias")
    same = [None if getattr(c, n) is None else getattr(c, n).to(dtype) for n in names]
    assert_within_budget(y, forward(*same), forward(*c.wide(*names)), dtype)

    start = torch.randn(M, K).to(dtype)
    for dx0 in (None, start):
        dx = linear4bit_small.linear4bit_small_dx(c.dy, *c.packed, K, None if dx0 is None else dx0.clone())
        gold = c.dy.double() @ c.w.double() + (0 if dx0 is None else dx0.double())
        assert_within_budget(dx, (c.dy @ c.w) + (0 if dx0 is None else dx0), gold, dtype)


def test_small_blocks_longer_than_a_row():
    """A block of 4096 spans rows of 96 and ends within one; no bias, no adapter."""
    c = Case(3, 90, 96, 0, torch.float32, format=("nf4", 4096, False))
    y = linear4bit_small.linear4bit_small(c.x, *c.packed, 90, None, None, None, None, 1.0)
    assert_within_budget(y, c.x @ c.w.T, c.x.double() @ c.w.double().T, torch.float32)


def test_small_says_what_it_does_not_serve():
    assert linear4bit_small.small_unmet(64, 96, 64) == ""
    assert "at most 64 rows" in linear4bit_small.small_unmet(65, 96, 64)
    assert "multiple of 32" in linear4bit_small.small_unmet(4, 80, 64)


# Paths of the composition: few rows, many rows, and K that only the dequantised weight serves.
LINEAR = [
    pytest.param(9, 40, 64, 4, id="small"),
    pytest.param(70, 24, 64, 4, id="many-rows"),
    pytest.param(6, 13, 45, 3, id="odd"),
    pytest.param(1, 8, 80, 1, id="K80"),
    pytest.param(0, 8, 64, 2, id="empty"),
    pytest.param(9, 40, 64, 0, id="small-plain"),
    pytest.param(70, 13, 45, 0, id="odd-plain"),
]


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
@pytest.mark.parametrize("M, N, K, R", LINEAR)
def test_linear4bit(M, N, K, R, p, dtype):
    c = Case(M, N, K, R, dtype, p if R else 0.0)
    names = ("y", "dx", "da", "db", "dbias")

    def step(fwd, bwd):
        y, s = fwd(c.x, *c.packed, N, c.a, c.b, c.bias, c.lora_bias, 0.5, c.p, c.seed)
        grads = bwd(c.dy, c.x, *c.packed, K, c.a, c.b, s, 0.5, c.p, c.seed, True, bool(R), bool(R), True)
        return dict(zip(names, (y, *grads), strict=True))

    ours = step(linear4bit.linear4bit_fwd, linear4bit.linear4bit_bwd)
    peer = step(eager.linear4bit_fwd, eager.linear4bit_bwd)
    x, dy, w, a, b, bias, lora_bias = c.wide("x", "dy", "w", "a", "b", "bias", "lora_bias")
    if R:
        y, s = lora_linear_fwd(x, w, a, b, bias, lora_bias, 0.5, c.p, c.seed, "auto")
        grads = lora_linear_bwd(dy, x, w, a, b, s, 0.5, c.p, c.seed, "auto", True, True, True, True)
        gold = dict(zip(names, (y, *grads), strict=True))
    else:
        gold = {"y": x @ w.T + bias, "dx": dy @ w, "da": dy[:0, 0], "db": dy[:0, 0], "dbias": dy.sum(0)}
    assert ours["y"].dtype == ours["dx"].dtype == dtype and ours["dbias"].dtype == torch.float32
    assert_all_within_budget(ours, peer, gold, dtype)


@pytest.mark.parametrize("R", [0, 4])
def test_only_what_is_asked_for(R):
    c = Case(4, 8, 64, R, torch.float32)
    empty = c.x.new_empty(0)
    call = (c.a, c.b, empty, 0.5, 0.0, None)
    none = linear4bit.linear4bit_bwd(c.dy, empty, *c.packed, 64, *call, False, False, False, False)
    assert [t.shape for t in none] == [(0,)] * 4
    dx, da, db, _ = linear4bit.linear4bit_bwd(c.dy, empty, *c.packed, 64, *call, True, False, False, False)
    assert dx.shape == (4, 64) and da.shape == db.shape == (0,)
    expanded = torch.ones(1, 1).expand(4, 8)  # what sum().backward() sends
    dx, *_ = linear4bit.linear4bit_bwd(expanded, empty, *c.packed, 64, *call, True, False, False, False)
    assert dx.shape == (4, 64)


def test_deterministic():
    c = Case(9, 40, 1056, 4, torch.float16, 0.3)
    runs = []
    for _ in range(2):
        y, s = linear4bit.linear4bit_fwd(c.x, *c.packed, 40, c.a, c.b, c.bias, None, 0.5, c.p, c.seed)
        flags = (True, True, True, True)
        runs.append((y, *linear4bit.linear4bit_bwd(c.dy, c.x, *c.packed, 1056, c.a, c.b, s, 0.5, c.p, c.seed, *flags)))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_weight(N, K):
    blocks = N * K // 64
    scales = [meta(blocks, dtype=torch.uint8), meta(256, dtype=torch.float32)]
    scales += [meta(-(-blocks // 256), dtype=torch.float32), meta(dtype=torch.float32)]
    return meta(N * K // 2, dtype=torch.uint8), scales, "nf4", 64


def moved(launches):
    return sum(one.read_bytes + one.written_bytes + one.weight_bytes for one in launches)


N, K = 14336, 4096
PACKED = N * K // 2 + N * K // 64  # the bytes that hold the weight and its codes


def test_dequantize_moves_no_more_than_it_must():
    with _common.count_launches() as launches:
        dequantize.dequantize_4bit(*meta_weight(N, K), meta(N, K))
    assert len(launches) == 1
    ideal = PACKED + 2 * N * K
    assert ideal <= moved(launches) <= 1.02 * ideal


@pytest.mark.parametrize("M", [1, 16, 64])
def test_small_moves_no_more_than_it_must(M):
    ideal = PACKED + 2 * M * (K + N)
    with _common.count_launches() as launches:
        _, s = linear4bit.linear4bit_fwd(
            meta(M, K), *meta_weight(N, K), N, meta(16, K), meta(N, 16), None, None, 1.0, 0.0, None
        )
    product = [one for one in launches if one.name.startswith("linear4bit_small")]
    adapter = 2 * 16 * (M + N)
    assert s.shape == (M, 16)
    assert ideal + adapter <= moved(product) <= 1.05 * (ideal + adapter)
    with _common.count_launches() as launches:
        linear4bit.linear4bit_bwd(
            meta(M, N), meta(0), *meta_weight(N, K), K, None, None, meta(0), 1.0, 0.0, None, True, False, False, False
        )
    assert ideal <= moved(launches) <= 1.05 * ideal


@pytest.fixture
def cuda(monkeypatch):
    """fastpeft._cuda, its two primitives answered by the reference: what is tested is how it calls them."""
    extension = pytest.importorskip("fastpeft._C", reason="the extension is not built")
    monkeypatch.setattr(extension, "build_info", lambda: {"cuda": "90"})
    sys.modules.pop("fastpeft._cuda", None)
    module = importlib.import_module("fastpeft._cuda")
    del sys.modules["fastpeft._cuda"]
    calls = []

    def small(x, packed, scales, quant_type, block_size, s, b, bias, scale, accumulate, y):
        calls.append("small")
        w = dequantized(packed, scales, quant_type, block_size, y.shape[1], x.shape[1], x.dtype)
        assert b is None or b.stride(1) == 1
        total = x.double() @ w.double().T + (0 if bias is None else bias.double())
        y.copy_(total if b is None else total + scale * (s.double() @ b.to(s.dtype).double().T))
        assert not accumulate

    def dequantize(*args):
        calls.append("dequantize")
        eager_dequantize.dequantize_4bit(*args)

    monkeypatch.setattr(module, "_small", small)
    monkeypatch.setattr(module, "_PRIMITIVES", module._PRIMITIVES._replace(dequantize_4bit=dequantize))
    return module, calls


@pytest.mark.parametrize(
    "M, N, K, R, dtype, expected",
    [
        pytest.param(9, 40, 64, 4, torch.float16, ["small"], id="cuda"),
        pytest.param(9, 40, 64, 0, torch.float16, ["small"], id="cuda-plain"),
        pytest.param(9, 40, 96, 4, torch.float16, [], id="triton-K96"),
        pytest.param(9, 40, 64, 4, torch.float32, [], id="triton-fp32"),
        pytest.param(70, 24, 64, 4, torch.float16, ["dequantize", "dequantize"], id="many-rows"),
        pytest.param(0, 24, 64, 4, torch.float16, [], id="empty"),
    ],
)
def test_cuda_composition(cuda, M, N, K, R, dtype, expected):
    module, calls = cuda
    c = Case(M, N, K, R, dtype)
    results = []
    for backend in (module, eager):
        y, s = backend.linear4bit_fwd(c.x, *c.packed, N, c.a, c.b, c.bias, c.lora_bias, 0.5, 0.0, None)
        need = (True, bool(R), bool(R), True)
        results.append((y, *backend.linear4bit_bwd(c.dy, c.x, *c.packed, K, c.a, c.b, s, 0.5, 0.0, None, *need)))
    assert calls == expected
    for ours, peer in zip(*results, strict=True):
        torch.testing.assert_close(ours, peer, rtol=2e-2, atol=2e-2)


def test_no_cuda_in_this_extension():
    extension = pytest.importorskip("fastpeft._C", reason="the extension is not built")
    if extension.build_info()["cuda"] != "none":
        pytest.skip("the extension was built with CUDA")
    with pytest.raises(ImportError, match="built without CUDA"):
        importlib.import_module("fastpeft._cuda")


def test_choice_of_path(monkeypatch):
    """The prediction sends few rows to the packed bytes; a tuned entry overrides it."""
    _fourbit_cost.choose_small.cache_clear()
    for rows in (1, 16, 64):
        assert _fourbit_cost.choose_small(rows, N, K, "bf16", 64, 90)
    assert not _fourbit_cost.choose_small(4096, N, K, "bf16", 64, 90)
    monkeypatch.setitem(_fourbit_cost.LARGEST_SMALL, ("sm90", "bf16", N, K), 8)
    _fourbit_cost.choose_small.cache_clear()
    assert _fourbit_cost.choose_small(8, N, K, "bf16", 64, 90)
    assert not _fourbit_cost.choose_small(9, N, K, "bf16", 64, 90)
    _fourbit_cost.choose_small.cache_clear()
