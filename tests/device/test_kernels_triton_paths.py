"""What the Triton launchers decide before they launch, on meta tensors: nothing runs, so this needs no interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend is not installed")

from cases import unless_served
from fastpeft import dispatch, ops
from fastpeft.kernels import _launch
from fastpeft.kernels.linear4bit_small import linear4bit_small
from fastpeft.kernels.lora_expand import lora_expand_add
from fastpeft.kernels.lora_grad_a import lora_grad_a
from fastpeft.kernels.lora_shrink import lora_shrink


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def launched():
    """What would have been launched, in order; `given` names the arguments of one."""
    with _launch.captured() as seen:
        yield seen


def given(launch):
    return dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants


@pytest.mark.parametrize(
    ("rows", "stride", "copied"),
    [(34, 2**26, True), (33, 2**26, True), (32, 2**26, False), (34, 64, False), (1, 2**40, False)],
)
def test_rows_far_apart(launched, rows, stride, copied):
    """The last token of long sequences: rows that 32-bit offsets within a row block do not reach are copied."""
    x = torch.empty_strided((rows, 64), (stride, 1), dtype=torch.bfloat16, device="meta")
    lora_grad_a(x, meta(rows, 4), meta(4, 64), 0.0, None, True, True)
    args = given(launched[0])
    assert args["stride_xm"] == args["x_ptr"].stride(0) == (64 if copied else stride)
    lora_grad_a(x.new_empty(0), meta(rows, 4), meta(4, 64), 0.0, None, True, False)


@pytest.mark.parametrize("K", [4096, 5120, 8192, 11008, 14336, 18944, 65536])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_programs_of_grad_a(launched, K, p):
    """One or two on each of an H100's 132 SMs, never a few more than two, which would be a wave by themselves."""
    M, seed = 8192, meta(1, dtype=torch.int64)
    for R, share in ((16, 1 / 16), (64, 1 / 8)):
        launched.clear()
        with _launch.count_launches() as counted:
            lora_grad_a(meta(M, K), meta(M, R), meta(R, K), p, seed, False, True)
        groups, splits = launched[0].grid
        assert groups * splits >= 132
        assert splits == 1 or groups * splits <= 264
        assert counted[0].scratch_bytes == 4 * R * K * splits * (splits > 1)
        assert counted[0].scratch_bytes <= share * counted[0].read_bytes


@pytest.mark.parametrize("M", [1, 2048, 4096, 4160, 5000, 8000, 8192, 8256])
def test_programs_of_shrink(launched, M):
    """About one on each SM where the columns allow; 4,160 to 8,064 rows had half of that."""
    lora_shrink(meta(M, 4096), meta(16, 4096), 0.0, None)
    tiles, splits = launched[0].grid
    assert tiles * splits >= 125 or splits == 4096 // 1024
    assert splits == 1 or tiles < 128


@pytest.mark.parametrize("R", [16, 64])
def test_fp64_adapters(launched, R):
    """Their tiles of eight bytes an element would exceed shared memory: kernels meet fp32, gradients keep the dtype."""
    M, K, N = 64, 512, 256
    x, dy, s, w = meta(M, K), meta(M, N), meta(M, R), meta(N, K)
    a, b = meta(R, K, dtype=torch.float64), meta(N, R, dtype=torch.float64)
    run = lambda op, *args: dispatch.load(op, "triton")(*args)  # noqa: E731
    run("lora_shrink", x, a, 0.0, None)
    run("lora_expand", s, b, None, None, 1.0)
    run("lora_expand_add", dy, s, b, 1.0)
    run("lora_linear_fused_fwd", x, w, s, b, None, None, 1.0)
    run("lora_linear_fused_dx", dy, w, s, a, 0.0, None)
    packed = (meta(N * K // 2, dtype=torch.uint8), [meta(N * K // 64, dtype=torch.float32)], "nf4", 64)
    linear4bit_small(x, *packed, N, s, b, None, None, 1.0)
    linear4bit_small(x, *packed, N, None, None, None, None, 1.0)
    da, _ = run("lora_grad_a", x, s, a, 0.0, None, True, True)
    ds, db, _ = run("lora_grad_b", dy, s, b, 1.0, True, True)
    assert (da.dtype, db.dtype, ds.dtype) == (torch.float64, torch.float64, torch.bfloat16)
    assert len(launched) > 8
    for launch in launched:
        pointers = [value for value in launch.args if isinstance(value, torch.Tensor)]
        assert torch.float64 not in {each.dtype for each in pointers}, launch.kernel


@pytest.mark.parametrize(
    "op", [pytest.param("lora_grad_a", marks=unless_served("lora_grad_a", "triton", torch.float16))]
)
def test_fp64_gradients(op):
    """The values, not only the dtype."""
    x, ds, a = torch.randn(9, 40).half(), torch.randn(9, 3).half(), torch.randn(3, 40, dtype=torch.float64)
    ours, peer = (ops.lora_grad_a(x, ds, each, backend="triton") for each in (a, a.float()))
    assert torch.equal(ours[0], peer[0].double())
    assert torch.equal(ours[1], peer[1])


@pytest.mark.parametrize(("R", "rows"), [(16, 32), (64, 32)])
@pytest.mark.parametrize(
    ("K", "stride", "small"), [(512, 512, False), (513, 513, True), (512, 520, True), (504, 504, True)]
)
def test_ragged_rows_take_smaller_tiles(launched, R, rows, K, stride, small):
    """An address a register spills the table's tiles; bench/compile/kernels.py proves that the smaller ones do not."""
    x = torch.empty_strided((128, K), (stride, 1), dtype=torch.bfloat16, device="meta")
    lora_grad_a(x, meta(128, R), meta(R, K), 0.0, None, True, True)
    lora_expand_add(x, meta(128, R), meta(K, R), 1.0)
    lora_shrink(x, meta(R, K), 0.0, None)
    tiles = {launch.kernel.__name__: launch.constants for launch in launched}
    sides = [
        tiles["_lora_grad_a_kernel"]["BLOCK_M"],
        tiles["_lora_expand_kernel"]["BLOCK_N"],
        tiles["_lora_shrink_kernel"]["BLOCK_K"],
    ]
    assert sides == ([rows, 128, 64] if small else [64, 256, 128])
    passes = [launch.constants for launch in launched if launch.kernel.__name__ == "_lora_grad_a_kernel"]
    both = [constants["NEED_DX"] and constants["NEED_DA"] for constants in passes]
    assert both == ([False, False] if small else [True])
    launched.clear()
    tile = {"BLOCK_M": 64, "BLOCK_K": 64, "ONE_PASS": True, "num_warps": 4, "num_stages": 2}
    lora_grad_a(x, meta(128, R), meta(R, K), 0.0, None, True, True, tile=tile)
    assert launched[0].constants["BLOCK_M"] == 64
