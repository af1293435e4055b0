"""The mask: its bits in every backend, and its statistics."""

import pytest
import torch
from scipy.stats import chi2

from cases import normal
from fastpeft import ops
from fastpeft.ops._calls import draw_seed
from fastpeft.reference.dropout import keep_factor, keep_mask
from fastpeft.testing import backends
from instruction_sets import isas, running

ALPHA = 1e-6  # seeds are fixed, so a failure is a defect and not bad luck


def mask_of(backend: str, M: int, K: int, p: float, seed: int) -> torch.Tensor:
    """The bits that a backend uses, read off dx: all ones where ds a is 1."""
    _, dx = ops.lora_grad_a(
        torch.zeros(M, K), torch.ones(M, 1), torch.ones(1, K), p, torch.tensor(seed), need_da=False, backend=backend
    )
    assert set(dx.unique().tolist()) <= {0.0, torch.tensor(keep_factor(p)).item()}
    return dx != 0


def test_philox_against_random123():
    """The words of one counter, from an implementation in Python's integers; and the 10-round answer of Random123."""

    def philox(counter, key, rounds):
        c, k = list(counter), list(key)
        for _ in range(rounds):
            one, two = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [two >> 32 ^ c[1] ^ k[0], two & 0xFFFFFFFF, one >> 32 ^ c[3] ^ k[1], one & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    # kat_vectors of Random123 1.14: philox4x32 10, counter and key of digits of pi
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox(*pi, 10) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    seed = 0x0123456789ABCDEF
    for p, row, column in [(0.4, 0, 0), (0.4, 2, 33), (0.1, 1, 255), (0.97, 2, 256), (0.98, 0, 599), (0.98, 1, 61)]:
        mask = keep_mask(torch.tensor(seed), 3, 600, p, "cpu")
        words = philox((column >> 3, row, 0, 0), (seed & 0xFFFFFFFF, seed >> 32), 7)
        draw = words[(column & 7) >> 1] >> 16 * (column & 1) & 0x7FFF
        drops = round(32768 * p)
        assert bool(mask[row, column]) == (draw >= drops if p <= 31 / 32 else draw < 32768 - drops)


@pytest.mark.parametrize("backend", backends("lora_grad_a"))
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 0x123456789ABCDEF])
@pytest.mark.parametrize(("M", "K", "p"), [(3, 40, 0.37), (2, 513, 0.37), (97, 31, 0.98)])
def test_same_bits(backend, seed, M, K, p):
    assert torch.equal(mask_of(backend, M, K, p, seed), keep_mask(torch.tensor(seed), M, K, p, "cpu"))


@pytest.mark.parametrize("isa", isas())
def test_same_bits_in_every_instruction_set(isa):
    with running(isa):
        for p in (0.1, 31 / 32, 0.97, 0.99999):  # 31/32 is the last to count from the lower end
            assert torch.equal(mask_of("cpp", 5, 700, p, 99), keep_mask(torch.tensor(99), 5, 700, p, "cpu"))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_keep_rate(p):
    """Chi-square of the count, whole and by row, column, and column within a Philox block."""
    mask = keep_mask(torch.tensor(31), 512, 1024, p, "cpu").double()
    keep = 1 / keep_factor(p)
    assert abs(keep - (1 - p)) <= 2**-16
    for counts, size in (
        (mask.sum().view(1), mask.numel()),
        (mask.sum(1), 1024),
        (mask.sum(0), 512),
        (mask.view(512, 128, 8).sum((0, 1)), 512 * 128),
    ):
        statistic = ((counts - size * keep) ** 2 / (size * keep * (1 - keep))).sum().item()
        assert chi2.sf(statistic, counts.numel()) > ALPHA
        assert chi2.cdf(statistic, counts.numel()) > ALPHA  # too even is as wrong as too uneven


def independent(first: torch.Tensor, second: torch.Tensor, keep: float) -> bool:
    """Chi-square of the 2 x 2 table of two masks against independence at the known rate."""
    total = first.numel()
    statistic = 0.0
    for one in (True, False):
        for two in (True, False):
            expected = total * (keep if one else 1 - keep) * (keep if two else 1 - keep)
            observed = ((first == one) & (second == two)).sum().item()
            statistic += (observed - expected) ** 2 / expected
    return bool(chi2.sf(statistic, 3) > ALPHA)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_independence(p):
    keep, seed = 1 / keep_factor(p), torch.tensor(1234)
    mask = keep_mask(seed, 512, 1024, p, "cpu")
    for shift in (1, 2, 8, 31, 32, 64, 128, 255, 256, 512):
        assert independent(mask[:, shift:], mask[:, :-shift], keep), f"columns {shift} apart"
        if shift < 512:
            assert independent(mask[shift:], mask[:-shift], keep), f"rows {shift} apart"
    for other in (1235, 1234 + 2**32, 0):
        assert independent(mask, keep_mask(torch.tensor(other), 512, 1024, p, "cpu"), keep), f"seed {other}"


def test_calls_and_layers_differ_and_repeat():
    """A mask for each call, so for each layer too; torch.manual_seed repeats the sequence; the rank plays no part."""
    x, w = torch.ones(64, 256), torch.zeros(1, 256)

    def kept(rank):
        a = torch.zeros(rank, 256)
        a[0] = 1.0
        b = torch.zeros(1, rank)
        b[0, 0] = 1.0
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(ops.lora_linear(leaf, w, a, b, dropout=0.5).sum(), leaf)[0] != 0

    torch.manual_seed(4)
    first, second = kept(1), kept(1)
    torch.manual_seed(4)
    again, other_rank = kept(1), kept(8)
    assert torch.equal(first, again)
    assert torch.equal(second, other_rank)
    assert independent(first, second, 0.5)


def test_seeds_are_spread():
    torch.manual_seed(0)
    seeds = torch.stack([draw_seed("cpu") for _ in range(4096)])
    assert seeds.dtype == torch.int64
    assert seeds.unique().numel() == 4096
    bits = (seeds.view(-1, 1) >> torch.arange(62)) & 1
    statistic = ((bits.sum(0) - 2048.0) ** 2 / 1024.0).sum().item()
    assert chi2.sf(statistic, 62) > ALPHA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA GPU")
def test_replayed_graph_draws_afresh():
    x, w, a, b = (normal(*s).cuda() for s in ((64, 256), (8, 256), (4, 256), (8, 4)))
    graph = torch.cuda.CUDAGraph()
    ops.lora_linear(x, w, a, b, dropout=0.5)
    with torch.cuda.graph(graph):
        y = ops.lora_linear(x, w, a, b, dropout=0.5)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


def test_expectation():
    """The mean over masks is the layer without dropout: 1/keep is the right factor."""
    x, w, a, b = normal(1, 64), normal(3, 64), normal(2, 64), normal(3, 2)
    torch.manual_seed(8)
    with torch.no_grad():
        many = ops.lora_linear(x.expand(20000, 64), w, a, b, dropout=0.3)
    plain = ops.lora_linear(x, w, a, b)
    deviation = (many.mean(0) - plain[0]).abs() / (many.std(0) / 20000**0.5)
    assert (deviation < 5).all()
