"""The dispatch table: which backend serves where none is named, and what one that is named refuses."""

import pytest
import torch

from fastpeft import dispatch, ops
from fastpeft.dispatch import BACKENDS, EAGER, ROWS, TRITON, Row

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BYTES = {"quantize_4bit", "quantize_absmax"}


@pytest.fixture
def without_extension(monkeypatch):
    """What Triton and the reference serve where nothing is compiled."""
    importable = dispatch._import_error
    compiled = {each.module for row in ROWS.values() for each in row.backends if each.name in ("cpp", "cuda")}
    lacks = lambda module: "not built" if module in compiled else importable(module)  # noqa: E731
    monkeypatch.setattr(dispatch, "_import_error", lacks)
    dispatch._select.cache_clear()
    yield
    dispatch._select.cache_clear()


@pytest.mark.parametrize("op", ROWS)
def test_rows(op):
    names = [backend.name for backend in ROWS[op].backends]
    assert names == [name for name in BACKENDS if name in names], "in order of preference"
    assert names[-1] == "eager" and ROWS[op].get("eager") is EAGER, "the reference serves everything"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", ROWS)
def test_the_interpreter_serves_no_one_who_did_not_ask(op, dtype, without_extension):
    pytest.importorskip("triton", reason="the Triton backend is not installed")
    assert dispatch.select(op, None, "cpu", dtype) == "eager"
    if dispatch.unmet(op, "triton", "cpu", torch.float16):
        pytest.skip("TRITON_INTERPRET=1 was not set when triton was imported")
    if dtype != torch.bfloat16 or op in BYTES:
        served = dtype != torch.float32 or "fused" not in op
        assert (dispatch.unmet(op, "triton", "cpu", dtype) is None) == served
        return
    with pytest.raises(
        ValueError, match=r"backend must be able to serve .* Triton's interpreter does not compute in bfloat16"
    ):
        dispatch.select(op, "triton", "cpu", dtype)


def test_bfloat16_without_the_extension_is_the_reference(without_extension):
    """By the interpreter it was off by 1e10."""
    half = {"dtype": torch.bfloat16}
    call = torch.ones(4, 8, **half), torch.ones(6, 8, **half), torch.ones(2, 8), torch.ones(6, 2)
    assert torch.equal(ops.lora_linear(*call), ops.lora_linear(*call, backend="eager"))
    assert torch.equal(ops.lora_linear(*call), torch.full((4, 6), 24.0, **half))


def test_an_operator_without_cpp(monkeypatch):
    """It is not routed to C++, and who names it there is told what is missing."""
    monkeypatch.setitem(ROWS, "lora_dummy_fwd", Row("lora_dummy", (TRITON, EAGER)))
    assert dispatch.select("lora_dummy_fwd", None, "cpu", torch.float32) == "eager"
    with pytest.raises(
        ValueError, match=r"^lora_dummy: backend must .* got 'cpp', which requires an implementation of lora_dummy_fwd$"
    ):
        dispatch.select("lora_dummy_fwd", "cpp", "cpu", torch.float32, "lora_dummy")


@pytest.mark.parametrize("op", ["linear4bit_fwd", "linear4bit_bwd", "dequantize_4bit"])
def test_cuda_multiplies_in_16_bits(op, monkeypatch):
    """In fp32 it has no product: another backend is taken, and one that is named is refused."""
    monkeypatch.setattr(dispatch, "_import_error", lambda module: None)
    dispatch._select.cache_clear()
    try:
        assert {dispatch.select(op, None, "cuda", dtype) for dtype in FLOATS[1:]} == {"cuda"}
        if op == "dequantize_4bit":
            assert dispatch.select(op, None, "cuda", torch.float32) == "cuda"
            return
        assert dispatch.select(op, None, "cuda", torch.float32) == "triton"
        with pytest.raises(ValueError, match=r"got 'cuda', which requires bfloat16 or float16$"):
            dispatch.select(op, "cuda", "cuda", torch.float32)
    finally:
        dispatch._select.cache_clear()
