"""The GEMM that takes the rank-R product into its sum, forward and for dx (a GPU's strategy: no C++ form)."""

import pytest
import torch

from cases import Case, backend_cases, normal, unless_served
from fastpeft import dispatch, ops
from fastpeft.testing import assert_within_budget

# The copy engine wants rows of whole 16 bytes: K and N are multiples of 8, M and the rank are free.
ALIGNED = [Case(17, 32, 64, 3, "aligned"), Case(33, 304, 40, 24, "blocks")]
DTYPES = [torch.float16]
OP = "lora_linear_fused_fwd"
RUNS = pytest.mark.parametrize("backend", sorted({param.values[0] for param in backend_cases(OP)}))


@RUNS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_forward(backend, case, dtype, poisoned):
    x, w, s = (
        normal(case.M, case.K, dtype=dtype),
        normal(case.N, case.K, dtype=dtype, std=0.1),
        normal(case.M, case.R, dtype=dtype),
    )
    b, bias, lora_bias = normal(case.N, case.R), normal(case.N, dtype=dtype), normal(case.N)
    given = (x, w, s, b, bias, lora_bias)
    ours, peer = (ops.lora_linear_fused_fwd(*given, scale=0.7, backend=name) for name in (backend, "eager"))
    gold = ops.lora_linear_fused_fwd(*(t.double() for t in given), scale=0.7, backend="eager")
    assert_within_budget(ours, peer, gold, dtype)


@RUNS
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_dx(backend, case, dtype, p, poisoned):
    dy, w, ds = (
        normal(case.M, case.N, dtype=dtype),
        normal(case.N, case.K, dtype=dtype, std=0.1),
        normal(case.M, case.R, dtype=dtype),
    )
    given, seed = (dy, w, ds, normal(case.R, case.K)), torch.tensor(12) if p else None
    ours, peer = (ops.lora_linear_fused_dx(*given, p, seed, backend=name) for name in (backend, "eager"))
    gold = ops.lora_linear_fused_dx(*(t.double() for t in given), p, seed, backend="eager")
    assert_within_budget(ours, peer, gold, dtype)


def test_registration():
    x, w, s, a, b = normal(3, 8), normal(5, 8), normal(3, 2), normal(2, 8), normal(5, 2)
    torch.library.opcheck(torch.ops.fastpeft.lora_linear_fused_fwd.default, (x, w, s, b, None, None, 0.5, "eager"))
    torch.library.opcheck(torch.ops.fastpeft.lora_linear_fused_dx.default, (normal(3, 5), w, s, a, 0.0, None, "eager"))


def test_bad_input():
    with pytest.raises(
        ValueError, match=r"backend must be able to serve torch.float32 on cpu .*got 'cpp', which requires an impl"
    ):
        ops.lora_linear_fused_fwd(normal(3, 8), normal(5, 8), normal(3, 2), normal(5, 2), backend="cpp")
    with pytest.raises(TypeError, match=r"^lora_linear_fused_dx: ds must have the dtype of dy"):
        ops.lora_linear_fused_dx(normal(3, 5), normal(5, 8), normal(3, 2, dtype=torch.float16), normal(2, 8))


def operands(M=16, N=24, K=64, R=4):
    half = {"dtype": torch.float16}
    return normal(M, K, **half), normal(N, K, std=0.1, **half), normal(M, R, **half), normal(N, R)


TRITON = [pytest.param(OP, marks=unless_served(OP, "triton", torch.float16))]
ODD = [
    ("x", "have contiguous rows, got strides", lambda x, w: (x.t().contiguous().t(), w)),
    ("x", "have a row stride that is a multiple of 8 and at least its row, got 68", lambda x, w: (torch.cat((x, x), 1)[:, :68].contiguous()[:, :64], w)),
    ("x", "start at a multiple of 16 bytes, got address", lambda x, w: (torch.cat((x, x), 1)[:, 1:65], w)),
    ("w", "have contiguous rows, got strides", lambda x, w: (x, w.t().contiguous().t())),
    ("w", r"have a positive multiple of 8 \(16-byte rows for TMA\) as K, got 60", lambda x, w: (x[:, :60], w[:, :60])),
    ("w", r"have a positive multiple of 8 \(16-byte rows for TMA\) as N, got 20", lambda x, w: (x, w[:20])),
]  # fmt: skip


@pytest.mark.parametrize("op", TRITON)
@pytest.mark.parametrize(("argument", "text", "change"), ODD)
def test_operands_that_tma_does_not_read(op, argument, text, change):
    """Triton refuses what it read as if it were dense, or failed on; the reference takes it."""
    x, w, s, b = operands()
    x, w = change(x, w)
    b = b[: w.shape[0]]
    gold = x.double() @ w.double().t() + s.double() @ b.double().t()
    torch.testing.assert_close(
        ops.lora_linear_fused_fwd(x, w, s, b, backend="eager").double(), gold, rtol=0.01, atol=0.02
    )
    with pytest.raises(ValueError, match=f"^{op}: {argument} must {text}"):
        ops.lora_linear_fused_fwd(x, w, s, b, backend="triton")
    dy = x.new_zeros(x.shape[0], w.shape[0])
    if argument == "w":
        with pytest.raises(ValueError, match=f"^lora_linear_fused_dx: w must {text}"):
            ops.lora_linear_fused_dx(dy, w, s, normal(s.shape[1], w.shape[1]), backend="triton")


@RUNS
def test_any_strides_of_the_thin_operand(backend):
    x, w, s, b = operands()
    columns = s.t().contiguous().t()
    same = (ops.lora_linear_fused_fwd(x, w, each, b, backend=backend) for each in (s, columns))
    assert torch.equal(*same)
    dy, a = normal(16, 24, dtype=torch.float16), normal(4, 64)
    assert torch.equal(*(ops.lora_linear_fused_dx(dy, w, each, a, backend=backend) for each in (s, columns)))
    assert ops.lora_linear_fused_fwd(x[:0, :60], w[:, :60], s[:0], b, backend=backend).shape == (0, 24)


@pytest.mark.parametrize("op", TRITON)
@pytest.mark.parametrize("arch", [80, 89, 120, 121])
def test_gpus_without_its_tile(op, arch, monkeypatch):
    """No TMA before 9.0, too little shared memory from 12.0 on: by one rule for operands, dispatch and strategy."""
    from fastpeft.kernels import _cost, lora_linear_fused

    x, w, s, b = operands()
    monkeypatch.setattr(lora_linear_fused, "arch_of", lambda tensor: arch)
    with pytest.raises(
        ValueError,
        match=rf"^{op}: x must be on a GPU of compute capability 9.0 to 11.x .*, got {arch // 10}.{arch % 10}$",
    ):
        ops.lora_linear_fused_fwd(x, w, s, b, backend="triton")
    key = _cost.strategy_key("forward", 8192, 14336, 4096, 16, 0.0, "bf16", arch)
    monkeypatch.setitem(_cost.TABLE, key, "fused")
    assert _cost.choose_strategy.__wrapped__("forward", 8192, 14336, 4096, 16, 0.0, "bf16", arch) == "accumulate"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: divmod(arch, 10))
    assert "a GPU of compute capability 9.0 to 11.x" in dispatch.unmet(op, "triton", "cuda", torch.float16)
    assert dispatch.unmet("lora_shrink", "triton", "cuda", torch.float16) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index else divmod(arch, 10))
    assert dispatch.unmet(op, "triton", "cuda", torch.float16) is None
