"""linear4bit and linear4bit_lora: what is kept, checkpoints, autocast, graphs, registration, errors."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cases import Case, normal, wide
from fastpeft import ops
from fastpeft.testing import assert_within_budget, backends
from fourbit_cases import LEAVES, apply, quantized, values

EVERY = ["eager", *backends("linear4bit_fwd")]


def kept_by(run):
    """Every tensor that ``run`` saves for backward, and its result."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = run()
    return kept, y


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("wanted", LEAVES)
def test_only_what_is_needed(backend, wanted):
    """A frozen tensor gets no gradient, x is kept for A alone, s for B alone, and the weight packed alone."""
    q, given = quantized(10, 20), values(Case(6, 20, 10, 4, "need"), torch.float32)
    leaves = {name: given[name].clone().requires_grad_(name == wanted) for name in LEAVES}
    kept, y = kept_by(lambda: apply(leaves, q, backend, dropout=0.1))
    shapes = [tuple(t.shape) for t in kept]
    assert ((6, 20) in shapes) == (wanted == "lora_A")
    assert ((6, 4) in shapes) == (wanted == "lora_B")
    assert all(t.numel() < 10 * 20 or t.dtype == torch.uint8 for t in kept if t.shape not in ((6, 20), (256,)))
    y.backward(given["dy"])
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]
    assert q.packed.grad is None


@pytest.mark.parametrize("backend", EVERY)
def test_bytes_kept(backend):
    """fp16, x trained: x, a thin s and a seed beside what the layer holds anyway; without an adapter nothing."""
    M, K, N, R = 48, 256, 192, 4
    q, x = quantized(N, K), normal(M, K, dtype=torch.float16).requires_grad_()
    a, b = normal(R, K).requires_grad_(), normal(N, R).requires_grad_()
    held = {t.untyped_storage().data_ptr() for t in (a, b, q.packed, *q.scales)}

    def total(run):
        stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept_by(run)[0]}
        return sum(size for pointer, size in stores.items() if pointer not in held)

    lora = total(lambda: ops.linear4bit_lora(x, q, a, b, dropout=0.1, backend=backend))
    # fp16 has not the range of the gradients that s goes into.
    assert lora == M * K * 2 + M * R * (2 if backend == "triton" else 4) + 8
    assert total(lambda: ops.linear4bit(x, q, backend=backend)) == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", EVERY)
def test_checkpoint_draws_the_same_mask(backend, reentrant):
    q, a, b = quantized(8, 40), normal(2, 40).requires_grad_(), normal(8, 2).requires_grad_()
    x = normal(6, 40).requires_grad_()

    def run(t):
        return ops.linear4bit_lora(t, q, a, b, dropout=0.5, backend=backend)

    torch.manual_seed(9)
    plain = torch.autograd.grad(run(x).square().sum(), (x, a, b))
    torch.manual_seed(9)
    checkpoint(run, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, gold) for leaf, gold in zip((x, a, b), plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [name for name in EVERY if name != "triton"])
def test_autocast(backend, dtype):
    """fp32 everything under autocast: the output in autocast's dtype, gradients in the parameters' own."""
    q, given = quantized(32, 64), values(Case(16, 64, 32, 8, "autocast"), torch.float32)
    dy = given.pop("dy")
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    with torch.autocast("cpu", dtype=dtype):
        y = apply(leaves, q, backend, scale=0.5)
        assert y.dtype == ops.linear4bit(leaves["x"], q, backend=backend).dtype == dtype
    y.backward(dy.to(dtype))
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())
    gold = apply(wide(given, torch.float64), q, "eager", scale=0.5)
    assert_within_budget(y, apply(wide(given, dtype), q, "eager", scale=0.5), gold, dtype)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("backend", EVERY)
def test_compile(backend, p, double_quant):
    q, a, b = quantized(8, 16, double_quant=double_quant), normal(2, 16).requires_grad_(), normal(8, 2).requires_grad_()
    x = normal(3, 5, 16).requires_grad_()

    def run(t):
        y = ops.linear4bit_lora(t.sin(), q, a, b, scale=2.0, dropout=p, backend=backend)
        return (y + ops.linear4bit(t, q, backend=backend)).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    gold = torch.autograd.grad(run(x), (x, a, b))
    torch.manual_seed(2)
    for value, expected in zip(torch.autograd.grad(compiled(x), (x, a, b)), gold, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("backend", EVERY)
def test_registration(backend, double_quant):
    q, x, a, b, s = quantized(5, 6, double_quant=double_quant), normal(4, 6), normal(2, 6), normal(5, 2), normal(4, 2)
    fwd, bwd = torch.ops.fastpeft.linear4bit_fwd.default, torch.ops.fastpeft.linear4bit_bwd.default
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    weight, empty = (q.packed, q.scales, "nf4", 64), torch.empty(0)
    for p, seed in ((0.0, None), (0.2, torch.tensor(3))):
        args = (x, *weight, 5, a, b, None, None, 0.5, p, seed, backend)
        torch.library.opcheck(fwd, args, test_utils=checks)
        for need in ((True, True, True, True), (False, True, False, False)):
            args = (normal(4, 5), x, *weight, 6, a, b, s, 0.5, p, seed, *need, backend)
            torch.library.opcheck(bwd, args, test_utils=checks)
    torch.library.opcheck(fwd, (x, *weight, 5, None, None, normal(5), None, 1.0, 0.0, None, backend), test_utils=checks)
    args = (normal(4, 5), x, *weight, 6, None, None, empty, 1.0, 0.0, None, True, False, False, True, backend)
    torch.library.opcheck(bwd, args, test_utils=checks)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("backend", EVERY)
def test_packed_of_two_dimensions(backend, double_quant):
    """bitsandbytes' shape, which QLoRALinear keeps: the same bits as from one dimension, forward and dx."""
    flat = quantized(24, 64, double_quant=double_quant)
    column = replace(flat, packed=flat.packed.view(-1, 1))
    assert torch.equal(*(ops.dequantize_4bit(q, backend=backend) for q in (flat, column)))
    for M in (1, 5, 80):
        x, results = normal(M, 64), []
        for q in (flat, column):
            leaf = x.clone().requires_grad_()
            y = ops.linear4bit(leaf, q, backend=backend)
            results.append(torch.cat([y, *torch.autograd.grad(y.sum(), leaf)], 1))
        assert torch.equal(*results)


def test_meta():
    q = ops.quantize_4bit(torch.empty(5, 6, device="meta"))
    x = torch.empty(4, 6, device="meta", requires_grad=True)
    y = ops.linear4bit(x, q)
    y.sum().backward()
    assert y.shape == (4, 5) and x.grad.shape == x.shape


def good():
    return {"x": normal(4, 6), "weight": quantized(5, 6), "lora_A": normal(2, 6), "lora_B": normal(5, 2)}


def broken(**change):
    q = quantized(5, 6)
    for name, value in change.items():
        setattr(q, name, value)
    return {"weight": q}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
        ({"x": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(4, 7)}, ValueError, r"x must have shape \[..., in_features\] = \[..., 6\], got \[4, 7\]"),
        ({"x": torch.ones(4, 6, device="meta")}, ValueError, "x must be on the device of weight, cpu, got meta"),
        ({"weight": torch.ones(5, 6)}, TypeError, "weight must be a Weight4bit, got Tensor"),
        (broken(block_size=64.0), TypeError, "weight.block_size must be an int, got 64.0"),
        (broken(shape=torch.Size((30,))), ValueError, r"weight must have shape .* got \[30\]"),
        (broken(packed=torch.zeros(14, dtype=torch.uint8)), ValueError, r"weight.packed must have shape \[15\], got \[14\]"),
        (broken(scales=[torch.ones(2)]), ValueError, r"weight.absmax must have shape \[1\], got \[2\]"),
        (broken(scales=[torch.ones(1)] * 2), ValueError, "weight.scales must have 1 tensor or 4, got 2 of them"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \[out_features\] = \[5\], got \[4\]"),
        ({"bias": torch.ones(5, device="meta")}, ValueError, "bias must be on the device of x, cpu, got meta"),
        ({"bias": torch.ones(5, dtype=torch.int64)}, TypeError, "bias must be a floating point tensor, got torch.int64"),
        ({"bias": torch.ones(5, dtype=torch.complex64)}, TypeError, "bias must be a floating point tensor, got torch.complex64"),
        ({"lora_bias": torch.ones(5, dtype=torch.bool)}, TypeError, "lora_bias must be a floating point tensor, got torch.bool"),
        ({"lora_bias": torch.ones(5, device="meta")}, ValueError, "lora_bias must be on the device of x, cpu, got meta"),
        ({"backend": "gpu"}, ValueError, "backend must be one of cpp, cuda, triton, eager or None, got 'gpu'"),
        ({"lora_A": torch.ones(2, 7)}, ValueError, r"lora_A must have shape \[rank, in_features\] = \[any, 6\], got \[2, 7\]"),
        ({"lora_A": torch.ones(0, 6), "lora_B": torch.ones(5, 0)}, ValueError, "lora_A must have a rank of at least 1, got 0"),
        ({"lora_B": torch.ones(5, 3)}, ValueError, r"lora_B must have shape \[out_features, rank\] = \[5, 2\], got \[5, 3\]"),
        ({"lora_bias": torch.ones(5, 1)}, ValueError, r"lora_bias must have shape \[out_features\] = \[5\], got \[5, 1\]"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a float, got str"),
    ],
)  # fmt: skip
def test_bad_input(change, error, text):
    with pytest.raises(error, match=f"^linear4bit_lora: {text}"):
        ops.linear4bit_lora(**(good() | change))
    if change.keys() <= {"x", "weight", "bias", "backend"}:
        given = {name: value for name, value in (good() | change).items() if not name.startswith("lora")}
        with pytest.raises(error, match=f"^linear4bit: {text}"):
            ops.linear4bit(**given)
