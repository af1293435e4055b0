"""What the 4-bit launchers move, which path they take, and how the CUDA backend composes them."""

import importlib
import sys
from functools import partial

import pytest
import torch

from fastpeft import dispatch
from fastpeft.kernels import _fourbit_cost, _launch, linear4bit
from fastpeft.kernels import dequantize_4bit as dequantize
from fastpeft.kernels._cost import H100
from fastpeft.reference import dequantize_4bit as eager_dequantize
from fastpeft.reference import linear4bit as eager
from kernels_fourbit_cases import MARKS, Case, dequantized, weight

pytestmark = MARKS


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
    with _launch.count_launches() as launches:
        dequantize.dequantize_4bit(*meta_weight(N, K), meta(N, K))
    assert len(launches) == 1
    ideal = PACKED + 2 * N * K
    assert ideal <= moved(launches) <= 1.02 * ideal


@pytest.mark.parametrize("M", [1, 16, 64])
def test_small_moves_no_more_than_it_must(M):
    ideal = PACKED + 2 * M * (K + N)
    with _launch.count_launches() as launches:
        _, s = linear4bit.linear4bit_fwd(
            meta(M, K), *meta_weight(N, K), N, meta(16, K), meta(N, 16), None, None, 1.0, 0.0, None
        )
    product = [one for one in launches if one.name.startswith("linear4bit_small")]
    adapter = 2 * 16 * (M + N)
    assert s.shape == (M, 16)
    assert ideal + adapter <= moved(product) <= 1.05 * (ideal + adapter)
    with _launch.count_launches() as launches:
        linear4bit.linear4bit_bwd(
            meta(M, N), meta(0), *meta_weight(N, K), K, None, None, meta(0), 1.0, 0.0, None, True, False, False, False
        )
    assert ideal <= moved(launches) <= 1.05 * ideal


def forward_bytes(monkeypatch, augmented, M, R, p):
    monkeypatch.setattr(linear4bit, "choose_augmented", lambda *_: augmented)
    seed = meta(1, dtype=torch.int64) if p else None
    with _launch.count_launches() as launches:
        linear4bit.linear4bit_fwd(meta(M, K), *meta_weight(N, K), N, meta(R, K), meta(N, R), None, None, 1.0, p, seed)
    return moved(launches), [one.name for one in launches if not one.name.endswith("_reduce")]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_augmented_writes_y_once(monkeypatch, p):
    """Beside the dequantised weight, written and read: x read and copied, the copy read, y written; accumulate reads y too."""
    M, R = 2048, 16
    weight = PACKED + 2 * 2 * N * K
    augmented, names = forward_bytes(monkeypatch, True, M, R, p)
    assert names == ["lora_shrink", "dequantize_4bit", "augment", "gemm"]
    ideal = weight + 2 * (3 * M * K + M * N)
    assert ideal <= augmented <= 1.03 * ideal
    accumulate, names = forward_bytes(monkeypatch, False, M, R, p)
    assert names == ["lora_shrink", "lora_expand", "dequantize_4bit", "gemm"]
    ideal = weight + 2 * (2 * M * K + 3 * M * N)
    assert ideal <= accumulate <= 1.03 * ideal


def test_augmented_is_chosen_where_y_is_wider_than_x(monkeypatch):
    choose = _fourbit_cost.choose_augmented
    assert choose(2048, 14336, 4096, 16, torch.bfloat16, 90)
    assert not choose(2048, 4096, 14336, 16, torch.bfloat16, 90)
    monkeypatch.setitem(_fourbit_cost.LEAST_AUGMENTED, ("sm90", "bf16", 4096, 14336, 16), 1000)
    choose.cache_clear()
    assert choose(2048, 4096, 14336, 16, torch.bfloat16, 90) and not choose(999, 4096, 14336, 9, torch.bfloat16, 90)
    choose.cache_clear()


@pytest.fixture
def cuda(monkeypatch):
    """fastpeft._cuda, its primitives answered by the reference: what is tested is how it calls them."""
    extension = pytest.importorskip("fastpeft._C", reason="the extension is not built")
    monkeypatch.setattr(extension, "build_info", lambda: {"cuda": "90"})
    sys.modules.pop("fastpeft._cuda", None)
    module = importlib.import_module("fastpeft._cuda")
    del sys.modules["fastpeft._cuda"]
    calls = []

    def product(name, x, packed, scales, quant_type, block_size, s, b, bias, scale, accumulate, y):
        calls.append(name)
        w = dequantized(packed, scales, quant_type, block_size, y.shape[1], x.shape[1], x.dtype)
        assert (b is None or b.stride(1) == 1) and (bias is None or bias.is_contiguous())
        assert x.dtype != torch.float32 and x.data_ptr() % 16 == x.stride(0) % 8 == packed.data_ptr() % 8 == 0
        total = x.double() @ w.double().T + (0 if bias is None else bias.double())
        y.copy_(total if b is None else total + scale * (s.double() @ b.to(s.dtype).double().T))
        assert not accumulate

    def small_dx(dy, packed, scales, quant_type, block_size, accumulate, dx):
        calls.append("small_dx")
        total = (
            dy.double()
            @ dequantized(packed, scales, quant_type, block_size, dy.shape[1], dx.shape[1], dy.dtype).double()
        )
        dx.copy_(dx.double() + total if accumulate else total)

    def dequantize(*args):
        calls.append("dequantize")
        eager_dequantize.dequantize_4bit(*args)

    monkeypatch.setattr(module, "_small", partial(product, "small"))
    monkeypatch.setattr(module, "_mid", partial(product, "mid"))
    monkeypatch.setattr(module, "choose_mid", lambda *_: True)
    monkeypatch.setattr(module, "_small_dx", small_dx)
    monkeypatch.setattr(module, "_PRIMITIVES", module._PRIMITIVES._replace(dequantize_4bit=dequantize))
    return module, calls


@pytest.mark.parametrize(
    "M, N, K, R, dtype, expected",
    [
        pytest.param(9, 40, 64, 4, torch.float16, ["small", "small_dx"], id="cuda"),
        pytest.param(9, 40, 64, 0, torch.float16, ["small", "small_dx"], id="cuda-plain"),
        pytest.param(9, 40, 96, 4, torch.float16, ["small", "small_dx"], id="cuda-K96"),
        pytest.param(9, 40, 80, 4, torch.float16, ["dequantize", "dequantize"], id="few-rows-K80"),
        pytest.param(70, 24, 64, 4, torch.float16, ["mid", "dequantize"], id="mid"),
        pytest.param(70, 24, 64, 0, torch.float16, ["mid", "dequantize"], id="mid-plain"),
        pytest.param(70, 24, 96, 4, torch.float16, ["dequantize", "dequantize"], id="many-rows-K96"),
        pytest.param(513, 8, 64, 0, torch.float16, ["dequantize", "dequantize"], id="many-rows"),
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


@pytest.mark.parametrize("M, expected", [(9, "small"), (70, "mid")])
def test_cuda_takes_any_bytes(cuda, M, expected):
    """Rows of x that its kernels do not read are copied; a weight so laid out is dequantised, not handed to Triton's."""
    module, calls = cuda
    c = Case(M, 40, 64, 4, torch.float16)
    packed, rest = c.packed[0], c.packed[1:]
    odd_x = torch.cat((c.x, c.x), 1)[:, 1:65]
    odd_packed = torch.cat((packed[:1], packed))[1:]
    for x, bytes_, way in ((odd_x, packed, expected), (c.x, odd_packed, "dequantize")):
        results = [
            backend.linear4bit_fwd(x, bytes_, *rest, 40, c.a, c.b, c.bias, c.lora_bias, 0.5, 0.0, None)[0]
            for backend in (module, eager)
        ]
        assert calls.pop() == way and not calls
        torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_explained_paths(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastpeft._cuda", cuda[0])
    monkeypatch.setattr(linear4bit, "choose_augmented", lambda *_: False)
    packed, lora = Case(9, 40, 64, 4, torch.float16).packed, torch.empty(4, 64)

    def told(x, a):
        return dispatch.strategy("linear4bit_fwd", "cuda", x, *packed, 40, a, None, None, None, 1.0, 0.0, None)

    for rows, path in ((9, "small"), (70, "mid"), (600, "accumulate")):
        x = torch.empty(rows, 64, dtype=torch.bfloat16)
        assert told(x, lora).startswith(f"{path}: ")
    monkeypatch.setattr(linear4bit, "choose_augmented", lambda *_: True)
    assert told(x, lora).startswith("augmented: ")
    assert told(x, None).startswith("dequant: ")


@pytest.mark.parametrize("rows, width", [(5, 192), (3, 96), (1, 64)])
def test_dequantise_into_rows_further_apart(rows, width):
    """192 is whole blocks of 64, 96 is not; what lies between the rows is left alone."""
    packed, w = weight(rows, width)
    room = torch.full((rows, width + 16), 7.0)
    dequantize.dequantize_4bit(*packed, room[:, :width])
    assert torch.equal(room[:, :width], w) and (room[:, width:] == 7.0).all()


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


def test_choice_of_mid(monkeypatch):
    """Predicted well ahead of dequantising at 128 rows, not where its tiles are no faster than the vendor's GEMM."""
    _fourbit_cost.choose_mid.cache_clear()
    assert _fourbit_cost.choose_mid(128, N, K, "bf16", 64, 90)
    assert not _fourbit_cost.choose_mid(512, N, K, "bf16", 64, 90)
    # One processor's worth of tiles: K in spans, or its steps one after the other.
    alone = 2 * 128 * 256 * K / (_fourbit_cost.MID_RATE_HOPPER * H100.gemm_boost / H100.sms)
    assert _fourbit_cost.mid_time(128, 256, K, 64, H100) < alone / 4
    monkeypatch.setitem(_fourbit_cost.LARGEST_MID, ("sm90", "bf16", N, K), 300)
    _fourbit_cost.choose_mid.cache_clear()
    assert _fourbit_cost.choose_mid(300, N, K, "bf16", 64, 90)
    assert not _fourbit_cost.choose_mid(301, N, K, "bf16", 64, 90)
    _fourbit_cost.choose_mid.cache_clear()
