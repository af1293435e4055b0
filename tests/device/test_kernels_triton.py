"""Triton launchers under the interpreter against fp64, with the dropout mask of an independent numpy Philox."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend is not installed")

from fastpeft.kernels import _common, _launch, lora_linear_fused
from fastpeft.kernels.lora_expand import lora_expand, lora_expand_add
from fastpeft.kernels.lora_grad_a import lora_grad_a
from fastpeft.kernels.lora_grad_b import lora_grad_b
from fastpeft.kernels.lora_linear import lora_linear_bwd, lora_linear_fwd
from fastpeft.kernels.lora_linear_fused import can_fuse, lora_linear_fused_dx, lora_linear_fused_fwd
from fastpeft.kernels.lora_shrink import lora_shrink

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        "Interpreted" not in type(_common._reduce_splits_kernel).__name__,
        reason="TRITON_INTERPRET=1 was not set when triton was imported",
    ),
]

SEED = 0x1234567_89ABCDEF
# (M, N, K, R), each with the reason it is here.
CASES = [
    pytest.param(32, 64, 64, 16, id="round"),
    pytest.param(37, 45, 301, 3, id="odd"),
    pytest.param(1, 70, 270, 8, id="row"),
    pytest.param(0, 24, 40, 8, id="empty"),
    pytest.param(5, 7, 9, 1, id="rank1"),
    pytest.param(70, 33, 40, 24, id="rank24"),
    pytest.param(20, 40, 300, 64, id="rank64"),
    pytest.param(20, 36, 44, 100, id="rank100"),
    pytest.param(18, 40, 264, 256, id="rank256"),
    pytest.param(18, 24, 40, 300, id="rank300"),
]
DTYPES = [torch.float32, torch.float16]
DROPOUT = [0.0, 0.1]


def philox(counter, key, rounds=7):
    """Philox-4x32 in numpy; counter [..., 4] and key [2], uint32 values in uint64."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (np.uint64(k) for k in key)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ k0, b & low, (a >> np.uint64(32)) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3], -1)


def keep_mask(M, K, p, seed):
    """Keep mask [M, K] and the factor 1 / keep, from the contract's words alone."""
    threshold = round(p * 32768)
    row, col = np.meshgrid(np.arange(M), np.arange(K), indexing="ij")
    counter = np.stack([col >> 3, row & 0xFFFFFFFF, row >> 32, row * 0], -1)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    word = np.take_along_axis(words, ((col & 7) >> 1)[..., None], -1)[..., 0]
    draw = (word >> (16 * (col & 1)).astype(np.uint64)) & np.uint64(0x7FFF)
    kept = draw >= threshold if p <= 31 / 32 else draw < 32768 - threshold
    return torch.from_numpy(kept), 32768 / (32768 - threshold)


class Case:
    """Operands of one case; a and b are transposed views of fp32, x has a longer row stride than K."""

    def __init__(self, M, N, K, R, dtype, p):
        g = torch.Generator().manual_seed(M + 7 * N + 31 * K + R)
        self.x = (torch.randn(M, K + 3, generator=g).to(dtype))[:, :K]
        self.w = (torch.randn(N, K, generator=g) / max(K, 1) ** 0.5).to(dtype)
        self.a = (torch.randn(K, R, generator=g) / max(K, 1) ** 0.5).t()
        self.b = (torch.randn(R, N, generator=g) / R**0.5).t()
        self.s = torch.randn(M, R, generator=g).to(dtype)
        self.ds = torch.randn(M, R, generator=g).to(dtype)
        self.dy = torch.randn(M, N, generator=g).to(dtype)
        self.bias = torch.randn(N, 2, generator=g).to(dtype)[:, 0]
        self.lora_bias = torch.randn(N, 3, generator=g)[:, 1]
        self.p, self.dtype, self.scale = p, dtype, 0.7
        self.seed = torch.tensor([SEED]) if p else None
        mask, factor = keep_mask(M, K, p, SEED)
        self.mask = mask if p else torch.ones(M, K, dtype=torch.bool)
        self.factor = factor if p else 1.0

    def cast(self, work):
        """The operands in dtype `work`, adapters rounded to x's dtype first, as every backend does."""
        names = ("x", "w", "s", "ds", "dy", "bias", "lora_bias")
        thin = {n: getattr(self, n).to(self.dtype).to(work) for n in ("a", "b")}
        return {n: getattr(self, n).to(work) for n in names} | thin | {"mask": self.mask.to(work)}


def assert_close(ours, formula, case):
    """err(ours, gold) <= 2 * (err(peer, gold) + eps * max|gold|); the peer is the same formula in the tested dtype."""
    gold, peer = formula(**case.cast(torch.float64)), formula(**case.cast(case.dtype))
    assert ours.shape == gold.shape
    if gold.numel():
        eps = torch.finfo(case.dtype).eps
        budget = 2 * ((peer.double() - gold).abs().max() + eps * gold.abs().max())
        assert (ours.double() - gold).abs().max() <= budget


@pytest.fixture(params=DTYPES, ids=["fp32", "fp16"])
def dtype(request):
    return request.param


@pytest.fixture(params=DROPOUT, ids=["p0", "p0.1"])
def p(request):
    return request.param


@pytest.mark.parametrize("M, N, K, R", CASES)
def test_shrink(M, N, K, R, dtype, p):
    c = Case(M, N, K, R, dtype, p)
    s = lora_shrink(c.x, c.a, p, c.seed)
    assert s.dtype == dtype
    assert_close(s, lambda x, a, mask, **_: (x * mask * c.factor) @ a.T, c)


@pytest.mark.parametrize("p", [0.1, 0.98], ids=["0.1", "counted from the other end"])
def test_shrink_mask_bits(p):
    """With a the identity, s shows the mask itself: every bit, across two tiles of columns and of rows."""
    M, K = 70, 300
    s = lora_shrink(torch.ones(M, K), torch.eye(K), p, torch.tensor([SEED]))
    mask, factor = keep_mask(M, K, p, SEED)
    assert torch.equal(s, mask.float() * torch.tensor(factor, dtype=torch.float32))
    assert abs(mask.double().mean().item() - (1 - p)) < 0.01


@pytest.mark.parametrize("dropped", [1, 3277, 0x7BFF, 0x7C00, 0x7C01, 0x7FFF])
def test_packed_comparison(dropped):
    """What a GPU compares as fp16, NaN included (`set.geu` of absolute values), is the contract's rule of integers."""
    halves = np.arange(65536, dtype=np.uint16)
    rare = dropped > 0x7C00
    least = np.uint16(32768 - dropped if rare else dropped).view(np.float16)
    kept = ~(np.abs(halves.view(np.float16)) < least) ^ rare
    draws = (halves & 0x7FFF).astype(int)
    assert np.array_equal(kept, draws < 32768 - dropped if rare else draws >= dropped)


def test_shrink_splits():
    """Few rows and many columns: the reduction is split over K."""
    c = Case(3, 8, 5000, 8, torch.float32, 0.1)
    s = lora_shrink(c.x, c.a, 0.1, c.seed)
    assert_close(s, lambda x, a, mask, **_: (x * mask * c.factor) @ a.T, c)
    assert torch.equal(s, lora_shrink(c.x, c.a, 0.1, c.seed))


@pytest.mark.parametrize("M, N, K, R", CASES)
def test_expand(M, N, K, R, dtype):
    c = Case(M, N, K, R, dtype, 0.0)
    y = lora_expand(c.s, c.b, c.bias, c.lora_bias, c.scale)
    assert_close(y, lambda s, b, bias, lora_bias, **_: (bias + c.scale * (s @ b.T + lora_bias)).to(s.dtype), c)
    wide = c.dy.repeat(1, 2)
    lora_expand_add(wide[:, :N], c.s, c.b, c.scale)
    assert torch.equal(wide[:, N:], c.dy)
    assert_close(wide[:, :N], lambda dy, s, b, **_: dy + c.scale * (s @ b.T), c)


@pytest.mark.parametrize("M, N, K, R", CASES)
@pytest.mark.parametrize("need_db, need_bias", [(True, True), (False, False), (False, True)])
def test_grad_b(M, N, K, R, dtype, need_db, need_bias):
    c = Case(M, N, K, R, dtype, 0.0)
    ds, db, dbias = lora_grad_b(c.dy, c.s, c.b, c.scale, need_db, need_bias)
    assert_close(ds, lambda dy, b, **_: c.scale * (dy @ b), c)
    assert (ds.dtype, db.dtype, dbias.dtype) == (dtype, c.b.dtype, torch.float32)
    if need_db:
        assert_close(db, lambda dy, s, **_: c.scale * (dy.T @ s), c)
    if need_bias:
        assert_close(dbias, lambda dy, **_: dy.sum(0), c)
    assert need_db or db.shape == (0,)
    assert need_bias or dbias.shape == (0,)


@pytest.mark.parametrize("M, N, K, R", CASES)
@pytest.mark.parametrize("need_dx, need_da", [(True, True), (False, True), (True, False)])
def test_grad_a(M, N, K, R, dtype, p, need_dx, need_da):
    c = Case(M, N, K, R, dtype, p)
    da, dx = lora_grad_a(c.x, c.ds, c.a, p, c.seed, need_dx, need_da)
    assert (da.dtype, dx.dtype) == (c.a.dtype, dtype)
    if need_da:
        assert_close(da, lambda x, ds, mask, **_: ds.T @ (x * mask * c.factor), c)
    if need_dx:
        assert_close(dx, lambda ds, a, mask, **_: mask * (ds @ a) * c.factor, c)
    assert need_da or da.shape == (0,)
    assert need_dx or dx.shape == (0,)


def test_splits_and_determinism():
    """Enough rows for several spans: partial sums are added, and twice to the same bytes."""
    c = Case(700, 40, 40, 8, torch.float32, 0.1)
    ds, db, dbias = lora_grad_b(c.dy, c.s, c.b, c.scale, True, True)
    assert_close(db, lambda dy, s, **_: c.scale * (dy.T @ s), c)
    assert_close(dbias, lambda dy, **_: dy.sum(0), c)
    da, dx = lora_grad_a(c.x, c.ds, c.a, c.p, c.seed, True, True)
    assert_close(da, lambda x, ds, mask, **_: ds.T @ (x * mask * c.factor), c)
    again = (*lora_grad_b(c.dy, c.s, c.b, c.scale, True, True), *lora_grad_a(c.x, c.ds, c.a, c.p, c.seed, True, True))
    assert all(torch.equal(one, two) for one, two in zip((ds, db, dbias, da, dx), again, strict=True))


# Sizes TMA serves (multiples of 8) that still leave ragged tiles.
FUSED = [
    pytest.param(40, 24, 72, 16, id="small"),
    pytest.param(1, 8, 8, 1, id="row"),
    pytest.param(0, 8, 8, 2, id="empty"),
    pytest.param(130, 264, 272, 70, id="ragged"),
]


def _fusable(case):
    case.x, case.w = case.x.contiguous(), case.w.contiguous()
    return case


@pytest.mark.parametrize("M, N, K, R", FUSED)
def test_fused_fwd(M, N, K, R):
    c = _fusable(Case(M, N, K, R, torch.float16, 0.0))
    assert can_fuse(c.x, c.w) == ""
    y = lora_linear_fused_fwd(c.x, c.w, c.s, c.b, c.bias, c.lora_bias, c.scale)
    formula = lambda x, w, s, b, bias, lora_bias, **_: (x @ w.T + bias + c.scale * (s @ b.T + lora_bias)).to(x.dtype)  # noqa: E731
    assert_close(y, formula, c)


@pytest.mark.parametrize("M, N, K, R", FUSED)
def test_fused_dx(M, N, K, R, p):
    c = _fusable(Case(M, N, K, R, torch.float16, p))
    dx = lora_linear_fused_dx(c.dy, c.w, c.ds, c.a, p, c.seed)
    assert_close(dx, lambda dy, w, ds, a, mask, **_: dy @ w + mask * (ds @ a) * c.factor, c)


def test_can_fuse_says_why():
    x, w = torch.zeros(4, 16).half(), torch.zeros(8, 16).half()
    assert can_fuse(x, w) == ""
    assert "multiple of 8" in can_fuse(x[:, :12], w[:, :12])
    assert "fp16 or bf16" in can_fuse(x.float(), w.float())
    assert "contiguous rows" in can_fuse(x, w.t().contiguous().t())
    assert "16 bytes" in can_fuse(torch.zeros(4 * 16 + 1).half()[1:].view(4, 16), w)
    with pytest.raises(ValueError, match="lora_linear: strategy must be 'accumulate' or 'auto' here, got 'fused'"):
        lora_linear_fwd(
            x.float(), w.float(), w[:2].float(), w[:, :2].float(), None, None, 1.0, 0.0, None, strategy="fused"
        )


@pytest.mark.parametrize("strategy", ["accumulate", "fused", "auto"])
def test_linear(strategy, p):
    c = _fusable(Case(33, 40, 264, 8, torch.float16, p))
    y, s = lora_linear_fwd(c.x, c.w, c.a, c.b, c.bias, c.lora_bias, c.scale, p, c.seed, strategy=strategy)
    forward = lambda x, w, a, b, bias, lora_bias, mask, **_: (  # noqa: E731
        x @ w.T + bias + c.scale * ((x * mask * c.factor) @ a.T @ b.T + lora_bias)
    ).to(x.dtype)
    assert_close(y, forward, c)
    c.s = s
    out = lora_linear_bwd(c.dy, c.x, c.w, c.a, c.b, s, c.scale, p, c.seed, True, True, True, True, strategy=strategy)
    assert_close(out[0], lambda dy, w, a, b, mask, **_: dy @ w + mask * (c.scale * (dy @ b) @ a) * c.factor, c)
    assert_close(out[1], lambda x, dy, b, mask, **_: (c.scale * (dy @ b)).T @ (x * mask * c.factor), c)
    assert_close(out[2], lambda dy, s, **_: c.scale * (dy.T @ s), c)
    assert_close(out[3], lambda dy, **_: dy.sum(0), c)
    none = lora_linear_bwd(
        c.dy, c.x, c.w, c.a, c.b, s, c.scale, p, c.seed, False, False, False, False, strategy=strategy
    )
    assert [t.shape for t in none] == [(0,)] * 4


@pytest.mark.parametrize("strategy, forward, backward", [("accumulate", (2, 3), (4, 2)), ("fused", (2, 1), (2, 2))])
def test_bytes_moved(strategy, forward, backward, p):
    """Meta tensors launch nothing and count everything: elements moved of the two large activations, within 3 %."""
    M = 8192
    K = N = 4096
    shapes = ((M, K), (M, N), (N, K), (16, K), (N, 16))
    x, dy, w, a, b = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    seed = torch.empty(1, dtype=torch.int64, device="meta") if p else None
    with _launch.count_launches() as fwd:
        _, s = lora_linear_fwd(x, w, a, b, None, None, 1.0, p, seed, strategy=strategy)
    with _launch.count_launches() as bwd:
        lora_linear_bwd(dy, x, w, a, b, s, 1.0, p, seed, True, True, True, False, strategy=strategy)
    for launches, (mk, mn) in ((fwd, forward), (bwd, backward)):
        ideal = 2 * (mk * M * K + mn * M * N)
        assert ideal <= sum(one.read_bytes + one.written_bytes for one in launches) <= 1.03 * ideal
        assert sum(one.weight_bytes for one in launches) == 2 * N * K
        assert sum(one.flop for one in launches) >= 2 * M * N * K
    assert sum(one.scratch_bytes for one in bwd) < 0.1 * 2 * (4 * M * K + 2 * M * N)


def test_tile_lookup():
    tiles = lora_linear_fused.TILES
    assert _common.lookup_tile(tiles, 103, torch.float16, 8, "fwd") == tiles[100, "half", "fwd", 64]
    assert _common.lookup_tile(tiles, 90, torch.bfloat16, 999, "dx") == tiles[90, "half", "dx", 64]
