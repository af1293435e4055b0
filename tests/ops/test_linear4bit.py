"""fastpeft.ops.linear4bit and linear4bit_lora: forward and every gradient against the reference."""

import pytest
import torch

from cases import Case, backend_cases, normal, wide
from fastpeft import ops
from fastpeft.ops import Weight4bit
from fastpeft.ops._calls import draw_seed
from fastpeft.reference.dropout import keep_factor, keep_mask
from fastpeft.testing import assert_all_within_budget, assert_within_budget, backends
from fourbit_cases import QUANT_TYPES, apply, call, quantized, values

OP = "linear4bit_fwd"
EVERY = ["eager", *backends(OP)]


def compare(given, q, backend, dtype, *, p, scale=0.7, only=None):
    ours = call(given, q, backend, scale=scale, p=p)
    peer = call(given, q, "eager", scale=scale, p=p)
    gold = call(wide(given, torch.float64), q, "eager", scale=scale, p=p)
    if only is not None:
        ours, peer, gold = ({name: found[name] for name in only} for found in (ours, peer, gold))
    assert_all_within_budget(ours, peer, gold, dtype)
    for name, value in ours.items():
        assert value.dtype == given[{"y": "x"}.get(name, name[1:])].dtype, name


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("backend", "case", "dtype"), backend_cases(OP))
def test_forward_backward(backend, case, dtype, p, poisoned):
    compare(values(case, dtype), quantized(case.N, case.K), backend, dtype, p=p)


@pytest.mark.parametrize(("backend", "case", "dtype"), backend_cases(OP))
def test_without_an_adapter(backend, case, dtype, poisoned):
    bare = Case(case.M, case.K, case.N, 0, case.why)
    compare(values(bare, dtype), quantized(case.N, case.K), backend, dtype, p=0.0)


@pytest.mark.parametrize("M", [1, 3, 40])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("block_size", [32, 128, 4096])
@pytest.mark.parametrize("backend", backends(OP))
def test_formats(backend, block_size, quant_type, double_quant, M, poisoned):
    """Blocks that straddle rows, that hold several rows, and one longer than the weight; y and dx alone read it."""
    for N, K in ((24, 160), (10, 99)):
        q = quantized(N, K, quant_type, block_size, double_quant)
        given = values(Case(M, K, N, 4, "format"), torch.float32, biases=False)
        compare(given, q, backend, torch.float32, p=0.0, only=("y", "dx"))


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("backend", "case", "dtype"), [c for c in backend_cases(OP) if "odd" in c.id])
def test_mixed_adapter_dtype(backend, case, dtype, adapter, poisoned):
    if backend == "triton" and adapter is torch.bfloat16:
        adapter = torch.float16
    given = values(case, dtype, adapter) | {"bias": normal(case.N)}  # the base's bias in a dtype of its own, too
    compare(given, quantized(case.N, case.K), backend, dtype, p=0.1)


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 24, 64, 100, 256])
@pytest.mark.parametrize("M", [2, 50])
@pytest.mark.parametrize("backend", [name for name in backends(OP) if name == "cpp"])
def test_ranks(backend, M, rank, poisoned):
    compare(values(Case(M, 70, 90, rank, "rank"), torch.float32), quantized(90, 70), backend, torch.float32, p=0.1)


@pytest.mark.parametrize("M", [1, 19])
@pytest.mark.parametrize("backend", backends(OP))
def test_strides(backend, M, poisoned):
    """x a view into a wider tensor and column by column, A and B transposed, dy expanded."""
    K, N, R = 40, 24, 5
    q = quantized(N, K)
    given = {"x": normal(M, K), "lora_A": normal(K, R, std=0.2).t(), "lora_B": normal(R, N).t()}
    given["dy"] = normal(1, N).expand(M, N)
    compare(given, q, backend, torch.float32, p=0.0)
    gold = apply(given, q, "eager")
    wider = torch.cat([given["x"], torch.full((M, 8), torch.nan)], dim=1)[:, :K]
    for x in (wider, given["x"].t().contiguous().t()):
        torch.testing.assert_close(apply(given | {"x": x}, q, backend), gold)
    biases = {"bias": normal(N, 2)[:, 0], "lora_bias": normal(1).expand(N)}
    dense = {name: bias.contiguous() for name, bias in biases.items()}
    assert torch.equal(apply(given | biases, q, backend), apply(given | dense, q, backend))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (2, 1, 3, 12), (2, 0, 12)])
def test_leading_dimensions(backend, shape, lora):
    q, a, b = quantized(5, 12), normal(3, 12), normal(5, 3)
    w = ops.dequantize_4bit(q, backend="eager")
    x = normal(*shape).requires_grad_()
    y = ops.linear4bit_lora(x, q, a, b, scale=2.0, backend=backend) if lora else ops.linear4bit(x, q, backend=backend)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y, x @ w.t() + (2.0 * (x @ a.t() @ b.t()) if lora else 0.0))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.shape == x.shape


def test_gradcheck():
    q = quantized(5, 6)
    shapes = ((4, 6), (2, 6), (5, 2), (5,), (5,))
    leaves = [normal(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]

    def run(x, *rest):
        torch.manual_seed(1)
        return ops.linear4bit_lora(x, q, *rest, scale=0.5, dropout=0.3)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradcheck(lambda x, bias: ops.linear4bit(x, q, bias), (leaves[0], leaves[3]))


@pytest.mark.parametrize("backend", EVERY)
def test_tensor_scale(backend):
    q, x, a, b = quantized(5, 6), normal(4, 6), normal(2, 6), normal(5, 2)
    y = ops.linear4bit_lora(x, q, a, b, scale=torch.tensor(0.5), backend=backend)
    torch.testing.assert_close(y, ops.linear4bit_lora(x, q, a, b, scale=0.5, backend=backend))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("M", [1, 7, 300])
@pytest.mark.parametrize("backend", EVERY)
def test_deterministic(backend, M, p):
    if backend == "triton":
        M = min(M, 33)
    given, q = values(Case(M, 96, 80, 8, "twice"), torch.float32), quantized(80, 96)
    first, second = (call(given, q, backend, scale=1.0, p=p) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("M", [1, 21])
@pytest.mark.parametrize("backend", EVERY)
def test_dropout_is_the_mask_of_the_seed(backend, M):
    """The same bits of the mask in every backend: y and every gradient can be written down."""
    K, N, R, p = 300, 17, 4, 0.25
    q, x, a, b, dy = quantized(N, K), normal(M, K), normal(R, K, std=0.1), normal(N, R), normal(M, N)
    w = ops.dequantize_4bit(q, backend="eager")
    torch.manual_seed(5)
    mask = keep_mask(draw_seed("cpu"), M, K, p, "cpu") * keep_factor(p)

    def written_down(dtype):
        leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (x, a, b)]
        y = leaves[0] @ w.to(dtype).t() + (leaves[0] * mask.to(dtype)) @ leaves[1].t() @ leaves[2].t()
        y.backward(dy.to(dtype))
        return {"y": y.detach()} | dict(zip(("dx", "dlora_A", "dlora_B"), (t.grad for t in leaves), strict=True))

    ours = call({"x": x, "lora_A": a, "lora_B": b, "dy": dy}, q, backend, scale=1.0, p=p, seed=5)
    assert_all_within_budget(ours, written_down(torch.float32), written_down(torch.float64), torch.float32)


def test_of_bitsandbytes():
    """The value of bitsandbytes' own layer, within the budget of the same computation in eager."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = torch.nn.Linear(128, 48)
    theirs = bitsandbytes.nn.Linear4bit(128, 48, quant_type="nf4")
    theirs.load_state_dict(layer.state_dict())
    theirs = theirs.to("cpu")
    q = Weight4bit.from_quant_state(theirs.weight.data, theirs.weight.quant_state)
    x = normal(9, 128)
    bias = theirs.bias.detach()
    gold = ops.linear4bit(x.double(), q, bias.double())
    assert_within_budget(ops.linear4bit(x, q, bias), theirs(x).detach(), gold, torch.float32)
