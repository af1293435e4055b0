"""The emulator's twins of the PTX wrappers: against what PTX's manual says, and against what a GPU gave, once one has."""

import ctypes
import os

import pytest
import torch

from emulator import build, golden

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="the emulator needs a C++ compiler")
SANITIZED = os.environ.get("FASTPEFT_SANITIZE", "")


@pytest.fixture(scope="module")
def twins(emulator_folder):
    return ctypes.CDLL(str(golden.build_for_cpu(emulator_folder, SANITIZED)))


def halves(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return words.contiguous().view(dtype).float()


def fragment(rows: torch.Tensor, pointers: list[int], transposed: bool) -> torch.Tensor:
    """[lanes, matrices, 2]: what ldmatrix gives of rows [n, 8], the row of matrix j, i being that of pointer 8j + i."""
    matrices = rows[pointers].view(-1, 8, 8)
    matrices = matrices.transpose(1, 2) if transposed else matrices
    return matrices.reshape(-1, 32, 2).transpose(0, 1)


def expected(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    words = golden.given(dtype)
    rows = words.view(dtype).float().view(128, 8)
    lanes = torch.arange(32)
    pairs = [fragment(rows, [lane * 5 % 32 for lane in range(32)], turned) for turned in (False, True)]
    pairs += [fragment(rows, [lane * 3 % 16 for lane in range(16)], turned) for turned in (False, True)]

    copied = words[:128].view(torch.uint8).view(32, 16).clone()
    copied[torch.arange(16) >= (lanes % 17)[:, None]] = 0

    own = rows.reshape(-1, 2)[: 6 * 32].view(32, 6, 2)  # each lane's words of a and b
    a, b, c = torch.zeros(16, 16), torch.zeros(16, 8), torch.zeros(16, 8)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i, (row, k) in enumerate(((g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8))):
            a[row, k : k + 2] = own[lane, i]
        for i, k in enumerate((2 * t, 2 * t + 8)):
            b[k : k + 2, g] = own[lane, 4 + i]
        for i in range(4):
            c[g + 8 * (i // 2), 2 * t + i % 2] = 4 * lane + i
    c += a @ b
    sums = [[c[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] for i in range(4)] for lane in range(32)]
    return {
        "loads": torch.cat([words[:32], words[:64]]),
        "matrices": torch.cat(pairs, 1).reshape(-1),
        "copies": copied.view(torch.int32).reshape(-1),
        "products": torch.tensor(sums).view(-1),
        "barriers": torch.cat([words[:32].flip(0) + 5, words[:32].flip(0) + 7]),
    }


@pytest.mark.parametrize("name", golden.DTYPES)
def test_twins_as_documented(twins, name):
    dtype = golden.DTYPES[name]
    words = torch.tensor(golden.answers(twins, "cpu")[name], dtype=torch.int32)
    loads, matrices, copies, products, barriers = words.split([96, 384, 128, 128, 64])
    want = expected(dtype)
    assert torch.equal(loads, want["loads"])
    assert torch.equal(halves(matrices, dtype), want["matrices"])
    assert torch.equal(copies, want["copies"])
    assert torch.equal(products.view(torch.float32), want["products"])
    assert torch.equal(barriers, want["barriers"])


def test_twins_as_a_gpu(twins):
    """Word for word; `make gpu` writes the file."""
    gold = golden.read()
    if gold is None:
        pytest.skip("no GPU has written bench/results/ptx_twins.json yet")
    assert golden.answers(twins, "cpu") == gold["words"]


@pytest.mark.parametrize("half", [0, 1])
def test_twins_in_a_product(twins, half):
    """cp.async, ldmatrix and mma as the kernels use them, against a plain product of small integers."""
    dtype = torch.float16 if half else torch.bfloat16
    a, b = torch.randint(-6, 7, (16, 16)).to(dtype), torch.randint(-6, 7, (16, 8)).to(dtype)
    c = torch.full((16, 8), torch.nan)
    assert twins.twin_product(half, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, c))) == 0
    assert torch.equal(c, a.float() @ b.float())
