"""fastpeft.ops.quantize_4bit and Weight4bit: bitsandbytes' bytes, every backend's, and files."""

import copy
import io
import json
import pickle

import pytest
import torch

from cases import FLOATS, normal
from fastpeft import dispatch, ops
from fastpeft.ops import Weight4bit
from fastpeft.ops.quantize_4bit import _dynamic_map
from fourbit_cases import QUANT_TYPES, bitsandbytes, serving, shapes, weight


def assert_same(ours, other):
    assert torch.equal(ours.packed, other.packed)
    assert len(ours.scales) == len(other.scales)
    assert all(torch.equal(one, two) for one, two in zip(ours.scales, other.scales, strict=True))
    assert (ours.shape, ours.dtype) == (other.shape, other.dtype)
    assert (ours.quant_type, ours.block_size) == (other.quant_type, other.block_size)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize(("shape", "block_size"), shapes())
@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_are_those_of_bitsandbytes(shape, block_size, quant_type, double_quant, dtype):
    w = weight(shape, dtype)
    data, state = bitsandbytes().quantize_4bit(
        w, quant_type=quant_type, blocksize=block_size, compress_statistics=double_quant
    )
    ours = ops.quantize_4bit(w, quant_type, block_size, double_quant, backend="eager")
    assert_same(ours, Weight4bit.from_quant_state(data, state))
    parts, theirs = ours.to_parts(), state.as_dict(packed=True)
    assert parts.keys() == theirs.keys()
    assert all(torch.equal(parts[name], theirs[name]) for name in theirs)


def test_dynamic_map():
    code = torch.tensor(_dynamic_map())
    assert code.shape == (256,) and bool((code[1:] > code[:-1]).all())
    assert code[127] == 0 and code[-1] == 1
    assert torch.equal(code, bitsandbytes().create_dynamic_map())


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize(("shape", "block_size"), shapes())
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", serving("quantize_4bit"))
def test_backends_give_the_same_bytes(backend, shape, block_size, quant_type, dtype):
    w = weight(shape, dtype)
    assert_same(
        ops.quantize_4bit(w, quant_type, block_size, backend=backend),
        ops.quantize_4bit(w, quant_type, block_size, backend="eager"),
    )


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("backend", ["eager", *serving("quantize_4bit")])
def test_ties(backend, quant_type):
    """The midpoints of the table and their neighbours in fp32: each backend decides as the reference does."""
    table = ops.quantize_4bit(torch.ones(32), quant_type, 32).quant_map().sort().values
    middle = (table[1:] + table[:-1]) / 2
    values = torch.cat([middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1), table, torch.zeros(3)])
    w = torch.cat([values, torch.ones(64 - values.numel() % 64)]) if values.numel() % 64 else values
    blocks = torch.cat([torch.cat([chunk, torch.ones(32)]) for chunk in w.split(32)])
    ours = ops.quantize_4bit(blocks, quant_type, 64, False, backend=backend)
    assert_same(ours, ops.quantize_4bit(blocks, quant_type, 64, False, backend="eager"))
    exact = ops.dequantize_4bit(ours, backend="eager")
    assert bool(((exact - blocks).abs() <= (table[1:] - table[:-1]).max() / 2 + 1e-6).all())


@pytest.mark.parametrize("backend", serving("quantize_absmax"))
@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
def test_absmax_in_8_bits(backend, n):
    """Values over six decades, zeros among them, and blocks of nothing else."""
    code = torch.tensor(_dynamic_map())
    values = normal(n) * 10.0 ** torch.empty(n).uniform_(-6, 0)
    values[::7] = 0.0
    for given in (values, torch.zeros(n)):
        ours, peer = (dispatch.load("quantize_absmax", name)(given, code) for name in (backend, "eager"))
        assert all(torch.equal(one, two) for one, two in zip(ours, peer, strict=True))


@pytest.mark.parametrize("backend", ["eager", *serving("quantize_4bit")])
def test_strides_and_double(backend):
    w = weight((40, 24))
    expected = ops.quantize_4bit(w.t().contiguous(), backend=backend)
    assert_same(ops.quantize_4bit(w.t(), backend=backend), expected)
    assert_same(ops.quantize_4bit(w.double(), backend=backend), ops.quantize_4bit(w, backend=backend))
    trained = torch.nn.Parameter(w)
    assert not ops.quantize_4bit(trained, backend=backend).packed.requires_grad


def test_size_and_error():
    """4.127 bits an element, and no error above half of the widest step."""
    w = weight((1024, 256))
    q = ops.quantize_4bit(w)
    assert q.nbytes * 8 / w.numel() == pytest.approx(4.127, abs=0.04)
    plain = ops.quantize_4bit(w, double_quant=False)
    error = (ops.dequantize_4bit(plain) - w).view(-1, 64).abs().amax(1)
    assert bool((error <= 0.1520 * plain.absmax() + 1e-6).all())
    torch.testing.assert_close(q.absmax(), plain.absmax(), rtol=0.02, atol=0.2)


def test_deterministic():
    w = weight((96, 200))
    assert_same(ops.quantize_4bit(w), ops.quantize_4bit(w))


@pytest.mark.parametrize("backend", ["eager", *serving("quantize_4bit")])
def test_registration(backend):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    given = torch.ops.fastpeft.quantize_4bit.default, (normal(5, 13), "nf4", 32, backend)
    torch.library.opcheck(*given, test_utils=checks)
    given = torch.ops.fastpeft.quantize_absmax.default, (normal(300), torch.tensor(_dynamic_map()), backend)
    torch.library.opcheck(*given, test_utils=checks)


def test_meta():
    q = ops.quantize_4bit(torch.empty(33, 65, device="meta"))
    real = ops.quantize_4bit(normal(33, 65))
    assert q.packed.is_meta and q.packed.shape == real.packed.shape
    assert [s.shape for s in q.scales] == [s.shape for s in real.scales]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_quant_state(storage, double_quant):
    """bitsandbytes' own objects both ways, with the bytes under any storage dtype; no copy."""
    functional, w = bitsandbytes(), weight((32, 64))
    data, state = functional.quantize_4bit(w, quant_type="nf4", quant_storage=storage, compress_statistics=double_quant)
    q = Weight4bit.from_quant_state(data, state)
    assert q.packed.data_ptr() == data.data_ptr() and q.double_quant == double_quant
    assert_same(q, ops.quantize_4bit(w, double_quant=double_quant))
    assert_same(Weight4bit.from_quant_state(*q.to_quant_state()), q)
    torch.testing.assert_close(functional.dequantize_4bit(*q.to_quant_state()), functional.dequantize_4bit(data, state))
    assert_same(Weight4bit.from_parts(data, q.to_parts()), q)
    if double_quant:  # as transformers loads it, in the default dtype of the model
        state.offset = state.offset.bfloat16()
        assert Weight4bit.from_quant_state(data, state).scales[3].dtype == torch.float32


def test_repacked_for_a_cpu():
    functional = bitsandbytes()
    data, state = functional.quantize_4bit(weight((64, 64)), quant_type="nf4")
    data, state = functional._convert_weight_packed_for_cpu(data, state)
    with pytest.raises(ValueError, match="Weight4bit: data must be in bitsandbytes' storage format"):
        Weight4bit.from_quant_state(data, state)


def saved(q):
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q)), saved, Weight4bit.clone])
def test_copies(clone):
    q = ops.quantize_4bit(weight((16, 24)), "fp4")
    other = clone(q)
    assert_same(other, q)
    assert other.packed.data_ptr() != q.packed.data_ptr()
    assert q.to("cpu").packed is q.packed and q.to("meta").packed.is_meta


@pytest.mark.parametrize("target", [torch.float16, torch.ones(1, dtype=torch.float16), None, True], ids=repr)
def test_to_takes_a_device_only(target):
    with pytest.raises(TypeError, match=r"^Weight4bit: device must be a device, got "):
        ops.quantize_4bit(weight((4, 24))).to(target)


def test_repr_is_a_line():
    text = "shape=[4, 24], dtype=torch.float32, quant_type=nf4, block_size=64, double_quant=True, device=cpu"
    assert repr(ops.quantize_4bit(weight((4, 24)))) == f"Weight4bit({text})"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"w": [1.0]}, TypeError, "w must be a tensor, got list"),
        ({"w": torch.ones(4, dtype=torch.int32)}, TypeError, "w must be float32, bfloat16, float16 or float64, got torch.int32"),
        ({"w": torch.ones(0, 4)}, ValueError, r"w must have at least one element, got \[0, 4\]"),
        ({"w": torch.tensor([1.0, float("nan")])}, ValueError, "w must be finite, got inf or nan"),
        ({"w": torch.tensor([1.0, float("-inf")])}, ValueError, "w must be finite, got inf or nan"),
        ({"quant_type": "int4"}, ValueError, "quant_type must be one of nf4, fp4, got 'int4'"),
        ({"block_size": 48}, ValueError, "block_size must be one of 32, 64, .*, 4096, got 48"),
        ({"block_size": 64.0}, TypeError, "block_size must be an int, got 64.0"),
        ({"block_size": True}, TypeError, "block_size must be an int, got True"),
        ({"backend": "gpu"}, ValueError, "backend must be one of cpp, cuda, triton, eager or None, got 'gpu'"),
    ],
)  # fmt: skip
def test_bad_input(change, error, text):
    with pytest.raises(error, match=f"^quantize_4bit: {text}"):
        ops.quantize_4bit(**({"w": torch.ones(4, 8)} | change))
    assert ops.quantize_4bit(torch.tensor([3e38, 3e38])).shape == (2,)  # finite, though their sum is not


def without(parts, name):
    return {key: value for key, value in parts.items() if key != name}


def reworded(parts, key="quant_state.bitsandbytes__nf4", **change):
    """``parts`` with other JSON bytes, under ``key``."""
    rest = json.loads(bytes(parts["quant_state.bitsandbytes__nf4"].tolist())) | change
    text = torch.tensor(list(json.dumps(rest).encode()), dtype=torch.uint8)
    return without(parts, "quant_state.bitsandbytes__nf4") | {key: text}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data, parts: (data[:-1], parts), r"parts.packed must have shape \[192\], got \[191\]"),
        (lambda data, parts: (data, without(parts, "absmax")), "parts must be .*absmax"),
        (lambda data, parts: (data, parts | {"SCB": data}), "parts must be .*SCB"),
        (lambda data, parts: (data, {}), "parts must hold one of quant_state.bitsandbytes__nf4 and .*fp4"),
        (lambda data, parts: (data, parts | {"absmax": parts["absmax"][:-1]}), r"parts.absmax must have shape \[6\], got \[5\]"),
        (lambda data, parts: (data, parts | {"absmax": parts["absmax"].float()}), "parts.absmax must be torch.uint8, got torch.float32"),
        (lambda data, parts: (data, parts | {"nested_absmax": torch.ones(2)}), r"parts.scale must have shape \[1\], got \[2\]"),
        (lambda data, parts: (data, parts | {"quant_map": torch.zeros(16)}), "quant_map must be the table of nf4"),
        (lambda data, parts: (data, parts | {"quant_state.bitsandbytes__nf4": data[:9]}), "quant_state must be JSON bytes"),
        (lambda data, parts: (data, parts | {"quant_map": None}), "quant_map must be a tensor, got NoneType"),
        (lambda data, parts: ([1], parts), "data must be a tensor, got list"),
        (lambda data, parts: (data, reworded(parts, shape=[-16, -24])), r"parts.shape must hold no negative size, got \[-16, -24\]"),
        (lambda data, parts: (data, reworded(parts, quant_type="fp4")), "quant_type in quant_state.bitsandbytes__nf4 must be nf4, got fp4"),
        (lambda data, parts: (data, reworded(parts, "quant_state.bitsandbytes__fp4")), "quant_type in .*__fp4 must be fp4, got nf4"),
        (lambda data, parts: (data, reworded(parts, nested_offset="0.1")), "nested_offset must be a number, got '0.1'"),
        (lambda data, parts: (data, reworded(parts, nested_offset=None)), "nested_offset must be a number, got None"),
        (lambda data, parts: (data, reworded(parts, nested_offset=float("nan"))), "nested_offset must be finite in fp32, got nan"),
        (lambda data, parts: (data, reworded(parts, nested_offset=-1e39)), "nested_offset must be finite in fp32, got -1e"),
        (lambda data, parts: (data, reworded(parts, blocksize=64.0)), "parts.block_size must be an int, got 64.0"),
        (lambda data, parts: (data.to(torch.int64), parts), "data must be stored as uint8, bfloat16, float16, float32, got torch.int64"),
    ],
)  # fmt: skip
def test_bad_parts(change, text):
    q = ops.quantize_4bit(weight((16, 24)))
    with pytest.raises((ValueError, TypeError), match=f"^Weight4bit: {text}"):
        Weight4bit.from_parts(*change(q.packed, q.to_parts()))
