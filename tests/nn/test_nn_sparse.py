"""Sparse and pruned LoRA: masks of one bit an element, gradients masked in the kernels, zeros that stay, schedules."""

import copy

import pytest
import torch
from torch import nn

from cases import SMALL, normal
from fastpeft import (
    LoRALayer,
    PruningAwareLoRALayer,
    PruningAwareLoRALinear,
    SparseLoRALayer,
    SparseLoRALinear,
    dispatch,
    ops,
    remask_after,
)
from fastpeft.nn.factors.pruned import quantile
from nn_cases import linear
from variant_cases import assert_parity, assert_whole, masked_in_training


def sparse(layout="in_out", dtype=torch.float32, kind=SparseLoRALinear, **options):
    options = {"rank": 4, "dropout": 0.0, "alpha": 8.0, "layout": layout, **options}
    module = kind(linear(dtype=dtype), **options)
    nn.init.normal_(module.lora_B, std=0.4)
    module.remask()
    return module


def formula(module):
    mask_a, mask_b = module.mask_A, module.mask_B

    def run(p, x):
        a, b = p["lora_A"] * mask_a.to(x.dtype), p["lora_B"] * mask_b.to(x.dtype)
        a, b = (a.t(), b.t()) if module.layout == "in_out" else (a, b)
        return x @ p["weight"].t() + p["bias"] + x @ a.t() @ b.t() * module.scaling

    return run


def test_bits():
    mask = torch.rand(5, 19) < 0.4
    bits = ops.pack_mask(mask)
    assert bits.shape == (5, 3) and torch.equal(ops.unpack_mask(bits, 19), mask)
    assert ops.pack_mask(torch.tensor([[True, False, False, False, False, False, False, False, True]])).tolist() == [
        [1, 1]
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_parity(layout, dtype):
    module = sparse(layout, dtype, pattern="random" if layout == "in_out" else "2:4")
    assert_parity(module, formula(module), torch.randn(7, 32, dtype=torch.float64), dtype)


@pytest.mark.parametrize("op", ["lora_grad_a", "lora_grad_b"])
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_kernels_mask_what_they_write(op, backend, poisoned):
    """Split or not, whatever the rank: zero exactly where the bit is, elsewhere what there is without a mask."""
    if missing := dispatch.unmet(op, backend, "cpu", torch.float32):
        pytest.skip(f"{backend} requires {missing}")
    for case in (*SMALL[:2], SMALL[3]):
        M, C, R = case.M, case.K, 70 if case is SMALL[0] else case.R
        mask = torch.rand(R, C) < 0.5
        big, thin, factor = normal(M, C), normal(M, R), normal(R, C) if op == "lora_grad_a" else normal(C, R)
        for bits in (None, ops.pack_mask(mask)):
            if op == "lora_grad_a":
                grad = ops.lora_grad_a(big, thin, factor, mask=bits, backend=backend)[0]
            else:
                grad = ops.lora_grad_b(big, thin, factor, mask=bits, backend=backend)[1].t()
            if bits is None:
                whole = grad
        assert torch.equal(grad, torch.where(mask, whole, 0.0))


def test_double_backward_and_functional_are_masked():
    module = sparse(dtype=torch.float64, backend="eager")
    module.double()
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    y = module(x)
    (g,) = torch.autograd.grad(y.square().sum(), module.lora_A, create_graph=True)
    g.square().sum().backward()
    assert not (module.lora_B.grad * (1 - module.mask_B)).any() and module.lora_B.grad.any()
    params = {name: p.detach() for name, p in module.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x.detach(),)).square().sum())(params)
    assert not (grads["lora_A"] * (1 - module.mask_A)).any() and grads["lora_A"].any()


def test_patterns_and_sizes():
    layer = SparseLoRALayer(768, 512, rank=4, sparsity=0.5)
    assert layer.lora_A.shape == (768, 4) == layer.mask_A.shape and layer.mask_B.shape == (4, 512)
    assert set(layer.mask_A.unique().tolist()) == {0.0, 1.0} and abs(layer.sparsity - 0.5) < 0.05
    assert not (layer.lora_A * (1 - layer.mask_A)).any()
    packed = sum(layer.state_dict()[name].numel() for name in ("mask_A", "mask_B"))
    assert packed * 30 <= 4 * (layer.lora_A.numel() + layer.lora_B.numel())
    blocks = SparseLoRALayer(64, 48, rank=8, pattern="block", block_size=8).mask_A.t().view(8, 8, 8)
    assert torch.equal(blocks.amin(-1), blocks.amax(-1)) and 0 < blocks.mean() < 1
    layer = SparseLoRALayer(64, 46, rank=8, pattern="2:4")
    assert (layer.mask_A.t().view(8, 16, 4).sum(-1) == 2).all() and layer.sparsity == pytest.approx(0.5, abs=0.02)
    assert (layer.mask_B[:, :44].reshape(8, 11, 4).sum(-1) == 2).all() and (layer.mask_B[:, 44:] == 1).all()
    assert SparseLoRALayer(64, 64, pattern="1:4").sparsity == 0.75
    before = layer.mask_A
    layer.apply_sparsity(0.5)
    assert not torch.equal(before, layer.mask_A) and not (layer.lora_A * (1 - layer.mask_A)).any()
    assert SparseLoRALayer(8, 8, sparsity=0.0).sparsity == 0.0 and SparseLoRALayer(8, 8, sparsity=1.0).sparsity == 1.0


def test_whole():
    module = sparse()
    x = torch.randn(5, 32)
    assert_whole(module, x)
    masked_in_training(module, x)
    base = linear()
    torch.testing.assert_close(SparseLoRALinear(base, rank=4)(x), base(x))
    y = module(x)
    module.merge()
    torch.testing.assert_close(module(x), y)
    assert "sparsity=0.5, pattern=random" in repr(module)


@pytest.mark.parametrize("kind", [SparseLoRALinear, PruningAwareLoRALinear])
def test_zeros_stay(kind):
    """A thousand steps of AdamW with decay and momentum leave every masked element exactly zero."""
    module = sparse(kind=kind, rank=2)
    if kind is PruningAwareLoRALinear:
        module.prune(0.5)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    x, target = torch.randn(8, 32), torch.randn(8, 24)
    hidden = [(1 - module.mask_A).bool(), (1 - module.mask_B).bool()]
    for _ in range(1000):
        optimizer.zero_grad()
        (module(x) - target).square().mean().backward()
        optimizer.step()
    assert all(each.any() for each in hidden)
    assert not module.lora_A[hidden[0]].any() and not module.lora_B[hidden[1]].any()
    assert module.lora_A[~hidden[0]].all()


class Mixing(torch.optim.SGD):
    """Writes into every element, as an optimizer that multiplies matrices does."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(0.01)


def test_remask_after_optimizers_that_mix():
    module = sparse()
    optimizer = Mixing([module.lora_A, module.lora_B], lr=0.1)
    hook = remask_after(optimizer, module)
    optimizer.step()
    assert not (module.lora_A * (1 - module.mask_A)).any() and module.sparsity > 0.3
    hook.remove()
    optimizer.step()
    assert (module.lora_A * (1 - module.mask_A)).any()
    with pytest.raises(ValueError, match="module must hold sparse or pruned layers, got none"):
        remask_after(optimizer, LoRALayer(8, 8))
    with pytest.raises(TypeError, match="optimizer must be a torch Optimizer, got str"):
        remask_after("adam", module)


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_files(layout):
    """Packed bits under the documents' names; the documents' own float masks load too, and stale values become zero."""
    module, x = sparse(layout), torch.randn(3, 32)
    y, state = module(x), module.state_dict()
    assert state["mask_A"].dtype == torch.uint8 and state["mask_A"].shape == (4, 4)
    fresh = sparse(layout)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(x), y)
    floats = {**state, "mask_A": module.mask_A, "mask_B": module.mask_B}
    floats["lora_A"] = floats["lora_A"] + 5.0 * (1 - module.mask_A)
    fresh = sparse(layout)
    fresh.load_state_dict(floats)
    torch.testing.assert_close(fresh(x), y)
    assert torch.equal(fresh.mask_B, module.mask_B) and floats["mask_A"].dtype == torch.float32


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_threshold_is_torch_s_quantile(rate):
    for n in (1, 2, 7, 1000, 4096):
        values = torch.randn(n).abs()
        assert torch.equal(quantile(values, rate), torch.quantile(values, rate))
    low = torch.randn(300).bfloat16()
    torch.testing.assert_close(quantile(low, rate), torch.quantile(low.float(), rate), rtol=0, atol=0)


def test_quantile_of_more_elements_than_torch_takes():
    values = torch.zeros(33_000_001, dtype=torch.bfloat16)
    values[::2] = 1.0
    assert quantile(values, 0.25) == 0.0 and quantile(values, 0.75) == 1.0


def test_pruning_as_the_document_names_it():
    layer = PruningAwareLoRALayer(768, 768, rank=4, prune_rate=0.5)
    a = layer.lora_A.detach().clone()
    expected = a.abs() >= torch.quantile(a.abs(), 0.5)
    layer.prune()
    assert torch.equal(layer.mask_A.bool(), expected) and layer.mask_B.all()  # nothing of an all-zero B
    assert torch.equal(layer.lora_A, a * expected)
    again = layer.mask_A
    layer.prune()
    assert torch.equal(again, layer.mask_A)
    layer.prune(0.75)
    assert layer.mask_A.mean() == 0.25 and not (layer.mask_A > again).any()
    layer.prune(0.1)
    assert layer.mask_A.mean() == 0.25


def test_schedule():
    layer = PruningAwareLoRALayer(64, 32, schedule=[0.25, 0.5, 0.75])
    shares = []
    for _ in range(4):
        layer.prune()
        shares.append(1 - layer.mask_A.mean().item())
    assert shares == [0.25, 0.5, 0.75, 0.75] and layer.prune_step == 4
    twin = PruningAwareLoRALayer(64, 32, schedule=[0.25, 0.5, 0.75])
    twin.load_state_dict(layer.state_dict())
    assert twin.prune_step == 4 and torch.equal(twin.mask_A, layer.mask_A)
    linear_ = PruningAwareLoRALayer(64, 32, schedule=lambda step: step / 4)
    assert [round(linear_.prune() * (64 + 32) / 64, 2) for _ in range(3)] == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_scores_and_compact(layout):
    module = sparse(layout, kind=PruningAwareLoRALinear, score="product", rank=6)
    with torch.no_grad():
        (module.lora_A if layout == "out_in" else module.lora_A.t())[[1, 4]] *= 1e-3
    module.prune(2 / 6)
    x = torch.randn(3, 32)
    y, scaling, state = module(x), module.scaling, copy.deepcopy(module.state_dict())
    assert module.compact() == 4 and module.scaling == scaling and module.sparsity == 0.0
    torch.testing.assert_close(module(x), y)
    full = sparse(layout, kind=PruningAwareLoRALinear, score="product", rank=6)
    full.load_state_dict(module.state_dict())
    assert full.rank == 4
    torch.testing.assert_close(full(x), y)
    full.load_state_dict(state)
    torch.testing.assert_close(full(x), y)
    graded = sparse(layout, kind=PruningAwareLoRALinear, score="gradient")
    with pytest.raises(ValueError, match="lora_A must have a gradient for score='gradient'"):
        graded.prune(0.5)
    graded(x).square().sum().backward()
    scores = (graded.lora_A * graded.lora_A.grad).abs()
    graded.prune(0.5)
    assert torch.equal(graded.mask_A.bool(), scores >= torch.quantile(scores, 0.5))
    assert_whole(graded, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pruning_in_half_precision(dtype):
    layer = PruningAwareLoRALayer(64, 48, dtype=dtype)
    layer.prune(0.5)
    assert 0.4 < 1 - layer.mask_A.float().mean() < 0.6


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: SparseLoRALayer(8, 8, sparsity=1.5), ValueError, r"sparsity must be in \[0, 1\], got 1.5"),
        (lambda: SparseLoRALayer(8, 8, pattern="4:2"), ValueError, "pattern must be 'random', 'block' or 'n:m'"),
        (lambda: SparseLoRALayer(8, 8, pattern=24), ValueError, "pattern must be 'random'"),
        (lambda: SparseLoRALayer(8, 8, 4, 0.6, "2:4"), ValueError, "sparsity must be 0.5 for pattern '2:4', got 0.6"),
        (lambda: SparseLoRALayer(8, 8, block_size=0), ValueError, "block_size must be at least 1"),
        (lambda: SparseLoRALayer(8, 8, sparse=0.1), TypeError, r"sparse must be a known option.*sparsity\?"),
        (lambda: PruningAwareLoRALayer(8, 8, prune_rate=-0.1), ValueError, r"prune_rate must be in \[0, 1\]"),
        (lambda: PruningAwareLoRALayer(8, 8).prune(1.1), ValueError, r"rate must be in \[0, 1\], got 1.1"),
        (lambda: PruningAwareLoRALayer(8, 8, schedule=[]), ValueError, "schedule must hold at least one rate"),
        (lambda: PruningAwareLoRALayer(8, 8, schedule=0.5), TypeError, "schedule must be a sequence of rates or a function"),
        (lambda: PruningAwareLoRALayer(8, 8, score="random"), ValueError, "score must be one of magnitude, gradient, product"),
        (lambda: ops.lora_grad_a(normal(3, 9), normal(3, 2), normal(2, 9), mask=torch.zeros(2, 1, dtype=torch.uint8)), ValueError, r"mask must have shape \[2, 2\]"),
        (lambda: ops.lora_linear(normal(3, 9), normal(4, 9), normal(2, 9), normal(4, 2), masks=(None,)), TypeError, "masks must be a pair"),
        (lambda: ops.lora_linear(normal(3, 9), normal(4, 9), normal(2, 9), normal(4, 2), masks=(torch.zeros(2, 2), None)), TypeError, r"masks\[0\] must be uint8"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
