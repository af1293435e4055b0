"""The buffers that the CPU kernels keep between calls: for all shapes and dtypes, bounded, and given back on request."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastpeft
from cases import normal
from fastpeft import ops
from fastpeft.testing import backends

MIB = 1 << 20
LEAST, MOST = 1 << 16, 64 * MIB
pytestmark = pytest.mark.skipif("cpp" not in backends("lora_linear_fwd"), reason="the extension is not built")


@pytest.fixture
def native():
    from fastpeft import _native

    fastpeft.release_workspace()
    yield _native
    _native.set_isa("auto")
    fastpeft.release_workspace()


def step(M, N=256, K=192, R=32, dtype=torch.float32, fill=None):
    """y and every gradient of a layer over a 4-bit weight, the same values at every call."""
    torch.manual_seed(M)
    weight = ops.quantize_4bit(normal(N, K), backend="eager")
    leaves = [normal(*shape, dtype=dtype).requires_grad_() for shape in ((M, K), (R, K), (N, R))]
    if fill is not None:
        leaves[0].data.fill_(fill)
    y = ops.linear4bit_lora(leaves[0], weight, *leaves[1:], backend="cpp")
    return (y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y)))


def test_kept_and_released(native):
    step(300)
    kept = native.kept_bytes()
    assert LEAST <= kept <= MOST
    assert fastpeft.info().extension["workspace"] == f"{kept / MIB:.1f} MiB kept"
    step(300)
    assert native.kept_bytes() == kept  # the second call takes what the first gave back
    assert fastpeft.release_workspace() == kept and native.kept_bytes() == 0


def test_small_calls_keep_nothing(native):
    step(2, N=16, K=64, R=2)
    assert native.kept_bytes() == 0


def test_bounded(native):
    """Sums in fp32 of 24, 40 and 30 MiB, and one beyond all that may be kept."""
    native.set_isa("base")
    for rows in (24, 40, 30, 24, 80):
        weight = ops.quantize_4bit(normal(1024, 64), backend="eager")
        ops.linear4bit(normal(rows * 256, 64, dtype=torch.float16), weight, backend="cpp")
        assert native.kept_bytes() <= MOST
    assert native.kept_bytes() >= 24 * MIB


@pytest.mark.parametrize("isa", ["auto", "base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_a_buffer_held_does_not_matter(native, isa, dtype):
    """After calls of other sizes and dtypes full of NaN: the same bits as in fresh memory."""
    native.set_isa(isa)
    sizes = (3, 40, 300)
    fresh = []
    for M in sizes:
        fastpeft.release_workspace()
        fresh.append(step(M, dtype=dtype))
    for other in (torch.float32, torch.bfloat16, torch.float16):
        step(350, dtype=other, fill=torch.nan)
    for M, expected in zip(sizes, fresh, strict=True):
        again = step(M, dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
        step(400, fill=torch.nan)


def test_threads(native):
    """Calls at the same time hold buffers of their own."""
    weight = ops.quantize_4bit(normal(512, 256), backend="eager")
    inputs = [normal(200 + 10 * i, 256, dtype=torch.float16) for i in range(8)]
    expected = [ops.linear4bit(x, weight, backend="cpp") for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda x: ops.linear4bit(x, weight, backend="cpp"), inputs)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _child(queue):
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    queue.put(step(300)[0].sum().item())


def test_fork(native):
    expected = step(300)[0].sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()
