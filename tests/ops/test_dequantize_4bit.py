"""fastpeft.ops.dequantize_4bit: the same bits from every backend, and bitsandbytes' where its own are right."""

import pytest
import torch

from cases import FLOATS
from fastpeft import ops
from fastpeft.ops import Weight4bit
from fourbit_cases import QUANT_TYPES, bitsandbytes, serving, shapes, weight


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize(("shape", "block_size"), shapes())
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", serving("dequantize_4bit"))
def test_bits(backend, shape, block_size, quant_type, double_quant, dtype, poisoned):
    if backend == "triton" and dtype == torch.bfloat16:
        dtype = torch.float16  # Triton's interpreter cuts off what it should round
    q = ops.quantize_4bit(weight(shape, dtype), quant_type, block_size, double_quant)
    w = ops.dequantize_4bit(q, backend=backend)
    assert w.dtype == dtype and w.shape == shape
    assert torch.equal(w, ops.dequantize_4bit(q, backend="eager"))


@pytest.mark.parametrize("backend", ["eager", *serving("dequantize_4bit")])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_definition(backend, quant_type):
    """Every byte, two blocks, one value of absmax each."""
    packed = torch.arange(256, dtype=torch.uint8)
    q = Weight4bit(packed, [torch.tensor([2.0, 0.5])], torch.Size((512,)), torch.float32, quant_type, 256)
    table = q.quant_map()
    nibbles = torch.stack([torch.arange(256) // 16, torch.arange(256) % 16], 1).view(-1)
    expected = table[nibbles] * torch.tensor([2.0, 0.5]).repeat_interleave(256)
    assert torch.equal(ops.dequantize_4bit(q, backend=backend), expected)
    assert table.abs().max() == 1 and table.unique().numel() == (16 if quant_type == "nf4" else 15)


# bitsandbytes' CPU kernel reads a wrong absmax where a block straddles two rows (0.50.2: K % blocksize != 0, K even).
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize(("shape", "block_size"), [((24, 128), 64), ((8, 96), 32), ((5, 33), 64), ((3, 4096), 4096)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_bitsandbytes(shape, block_size, quant_type, double_quant, dtype):
    functional = bitsandbytes()
    data, state = functional.quantize_4bit(
        weight(shape, dtype), quant_type=quant_type, blocksize=block_size, compress_statistics=double_quant
    )
    with torch.compiler.set_stance("force_eager"):  # it compiles its own fallback, for seconds
        theirs = functional.dequantize_4bit(data, state)
    q = Weight4bit.from_quant_state(data, state)
    assert torch.equal(ops.dequantize_4bit(q, backend="eager"), theirs)


@pytest.mark.parametrize("backend", ["eager", *serving("dequantize_4bit")])
def test_out(backend, poisoned):
    q = ops.quantize_4bit(weight((33, 65), torch.float32))
    out = torch.empty(33, 65, dtype=torch.float16)
    assert ops.dequantize_4bit(q, out=out, backend=backend) is out
    assert torch.equal(out, ops.dequantize_4bit(q, torch.float16, backend="eager"))
    assert ops.dequantize_4bit(q, torch.float64).dtype == torch.float64
    assert torch.equal(ops.dequantize_4bit(q, backend=backend), ops.dequantize_4bit(q, backend=backend))


@pytest.mark.parametrize("backend", ["eager", *serving("dequantize_4bit")])
@pytest.mark.parametrize("double_quant", [False, True])
def test_registration(backend, double_quant):
    q = ops.quantize_4bit(weight((5, 13)), "nf4", 32, double_quant)
    args = (q.packed, q.scales, "nf4", 32, torch.zeros(5, 13), backend)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fastpeft.dequantize_4bit.default, args, test_utils=checks)


@pytest.mark.parametrize("backend", ["eager", *serving("dequantize_4bit")])
def test_compile(backend):
    q = ops.quantize_4bit(weight((8, 40)))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x @ ops.dequantize_4bit(q, backend=backend).t(), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(3, 40)
    torch.testing.assert_close(compiled(x), x @ ops.dequantize_4bit(q).t())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": torch.ones(4)}, TypeError, "q must be a Weight4bit, got Tensor"),
        ({"q": Weight4bit(torch.zeros(4, dtype=torch.uint8), [torch.ones(1)], torch.Size((-2, -4)), torch.float32, "nf4", 64)}, ValueError, r"q.shape must hold no negative size, got \[-2, -4\]"),
        ({"q": Weight4bit(torch.zeros(4, dtype=torch.uint8), [torch.ones(1)], torch.Size((9,)), torch.float32, "nf4", 64)}, ValueError, r"q.packed must have shape \[5\], got \[4\]"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32, bfloat16, float16 or float64, got torch.int8"),
        ({"out": torch.ones(5, 8)}, ValueError, r"out must have shape \[4, 8\], got \[5, 8\]"),
        ({"out": torch.ones(8, 4).t()}, ValueError, r"out must be contiguous, got strides \(1, 4\)"),
        ({"out": torch.ones(4, 8), "dtype": torch.float16}, TypeError, "out must have dtype torch.float16, got torch.float32"),
        ({"out": torch.ones(4, 8, device="meta")}, ValueError, "out must be on the device of q, cpu, got meta"),
        ({"out": torch.ones(4, 8, requires_grad=True)}, ValueError, "out must not require a gradient"),
        ({"out": torch.ones(4, 8, dtype=torch.int32)}, TypeError, "out must be float32, bfloat16, float16 or float64, got torch.int32"),
    ],
)  # fmt: skip
def test_bad_input(change, error, text):
    with pytest.raises(error, match=f"^dequantize_4bit: {text}"):
        ops.dequantize_4bit(**({"q": ops.quantize_4bit(torch.ones(4, 8))} | change))
