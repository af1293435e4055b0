"""What the Triton launchers decide before they launch, on meta tensors: nothing runs, so this needs no interpreter."""

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend is not installed")

from fastpeft.kernels.lora_grad_a import lora_grad_a

MODULES = ("_common", "lora_shrink", "lora_expand", "lora_grad_b", "lora_grad_a", "lora_linear_fused", "linear4bit_small")  # fmt: skip


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def launched(monkeypatch):
    """(kernel's name, grid, {argument: value}) of every launch, in order."""
    seen = []

    def launch(kernel, grid, like, args, tile):
        seen.append((kernel.__name__, grid, dict(zip(kernel.arg_names, args, strict=False)) | tile))

    for name in MODULES:
        monkeypatch.setattr(importlib.import_module(f"fastpeft.kernels.{name}"), "launch", launch)
    return seen


@pytest.mark.parametrize(
    ("rows", "stride", "copied"),
    [(34, 2**26, True), (33, 2**26, True), (32, 2**26, False), (34, 64, False), (1, 2**40, False)],
)
def test_rows_far_apart(launched, rows, stride, copied):
    """The last token of long sequences: rows that 32-bit offsets within a row block do not reach are copied."""
    x = torch.empty_strided((rows, 64), (stride, 1), dtype=torch.bfloat16, device="meta")
    lora_grad_a(x, meta(rows, 4), meta(4, 64), 0.0, None, True, True)
    _, _, args = launched[0]
    assert args["stride_xm"] == args["x_ptr"].stride(0) == (64 if copied else stride)
    lora_grad_a(x.new_empty(0), meta(rows, 4), meta(4, 64), 0.0, None, True, False)
