"""The launchers that quantise and dequantise in Triton under the interpreter: bytes of the reference."""

import numpy as np
import pytest
import torch

from fastpeft.kernels import dequantize_4bit as dequantize
from fastpeft.kernels import quantize_4bit as quantize
from fastpeft.reference import quantize_4bit as eager_quantize
from kernels_fourbit_cases import CODE, MARKS, dequantized, scales_of

pytestmark = MARKS


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
    special = torch.randn(n)
    special[: n // 2 : 3], special[n // 2 :: 5] = torch.nan, 0.0
    small = torch.randn(n) * 1e-41  # a scale that has no reciprocal, and zeros
    small[::7] = 0.0
    for values in (torch.randn(n), torch.zeros(n), small, special, special / 0.0, CODE.repeat(3)[:n].clone()):
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
