"""AdaLoRALayer, AdaLoRALinear and RankAllocator: the three forms, ranks, files, and PEFT's numbers over a schedule."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastpeft import AdaLoRALayer, AdaLoRALinear, RankAllocator, testing
from nn_cases import linear


def made(form="top_k", kind=AdaLoRALinear, dtype=torch.float32, **options):
    options = {"rank": 8, "form": form, "dropout": 0.0, **options}
    module = kind(linear(dtype=dtype), **options) if kind is AdaLoRALinear else kind(32, 24, **options)
    with torch.no_grad():
        module.lora_B.normal_(0, 0.3)
        module.gains.uniform_(0.5, 1.5)
    return module


def test_documents_forms():
    layer = AdaLoRALayer(768, 768)
    assert (layer.form, layer.current_rank, layer.max_rank, layer.min_rank) == ("top_k", 16, 16, 4)
    assert layer.lora_A.shape == (768, 16) and layer.importance.shape == (16,) and layer.scaling == 0.01
    assert type(layer.current_rank) is int and type(layer.get_effective_rank()) is int
    layer = AdaLoRALayer(input_dimension=768, output_dimension=512)
    assert layer.form == "scores" and layer.lora_A.shape == (8, 768) and layer.rank_importance.tolist() == [1.0] * 8
    assert (layer.scaling, layer.dropout_probability, layer.get_effective_rank()) == (2.0, 0.1, 8)
    layer = AdaLoRALayer(input_dimension=64, output_dimension=48, rank=4, alpha=8.0, rank_allocation="magnitude")
    assert layer.current_rank == 4
    layer = AdaLoRALayer(64, 48, form="svd", rank=4, alpha=8)
    assert layer.lora_E.shape == (4, 1) and not layer.lora_E.any() and layer.lora_B.any() and layer.scaling == 2.0
    assert AdaLoRALayer(64, 48, 8, 2, alpha=8).scaling == 1.0
    assert AdaLoRALinear.from_linear(linear()).form == "scores"
    assert AdaLoRALinear.from_linear(linear(), max_rank=8).form == "top_k"
    assert AdaLoRALinear(32, 24, 8, 2).lora_A.shape == (32, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["top_k", "scores", "svd"])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_parity(form, layout, dtype):
    """Values and gradients of the definition, y = x Wᵀ + scaling · Σ gain_k (x A_k) B_k over the ranks that act."""
    module = made(form, dtype=dtype, layout=layout)
    if form != "svd":
        module.keep_ranks(torch.arange(8) % 3 != 0)
    x = torch.randn(5, 32, dtype=torch.float64)
    results = {}
    for name, kind in (("ours", None), ("peer", dtype), ("gold", torch.float64)):
        leaf = {key: p.detach().to(kind or p.dtype).requires_grad_() for key, p in module.named_parameters()}
        h = x.to(dtype).to(kind or dtype).requires_grad_()
        if kind is None:
            module.zero_grad()
            y = module(h)
            y.float().square().sum().backward()
            grads = {key: p.grad for key, p in module.named_parameters() if p.requires_grad}
        else:
            a, b = (leaf["lora_A"], leaf["lora_B"]) if layout == "out_in" else (leaf["lora_A"].t(), leaf["lora_B"].t())
            gain = leaf[{"top_k": "importance", "scores": "rank_importance", "svd": "lora_E"}[form]].view(-1)
            active = module.active().to(gain.dtype)
            y = h @ leaf["weight"].t() + leaf["bias"] + (h @ a.t() * gain * active) @ b.t() * module.scaling
            y.float().square().sum().backward() if kind != torch.float64 else y.square().sum().backward()
            grads = {key: leaf[key].grad for key, p in module.named_parameters() if p.requires_grad}
        results[name] = {"y": y.detach(), "x": h.grad, **grads}
    testing.assert_all_within_budget(results["ours"], results["peer"], results["gold"], dtype)


@pytest.mark.parametrize("form", ["top_k", "scores", "svd"])
def test_identity_merge_copies_graphs(form):
    base = linear()
    x = torch.randn(3, 32)
    y0 = base(x)
    torch.testing.assert_close(AdaLoRALinear(base, rank=8, form=form)(x), y0)
    module = made(form)
    y = module(x)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), y)
    torch.testing.assert_close(copy.deepcopy(module)(x), y)
    torch.testing.assert_close(checkpoint(module, x, use_reentrant=False), y)
    module.merge()
    torch.testing.assert_close(module(x), y)
    module.unmerge()
    torch.testing.assert_close(module(x), y)
    assert f"form={form}" in repr(module)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_scores_choose_ranks_by_value():
    """S0 takes the first k of k large scores; the text says, and we take, the large ones."""
    module = made("scores")
    with torch.no_grad():
        module.rank_importance.copy_(torch.tensor([0.01, 0.02, 0.9, 0.8, 0.03, 0.7, 0.04, 0.05]))
    assert module.active().nonzero().view(-1).tolist() == [2, 3, 5] and module.get_effective_rank() == 3
    module(torch.randn(3, 32)).sum().backward()
    assert module.rank_importance.grad[[2, 3, 5]].all() and not module.rank_importance.grad[[0, 1, 4, 6, 7]].any()
    with torch.no_grad():
        module.rank_importance.fill_(0.0)
    assert module.active().tolist() == [True] + [False] * 7
    assert made("scores", adaptive_rank=False).current_rank == 8
    with torch.no_grad():
        module.rank_importance.copy_(torch.linspace(0, 0.7, 8))
    assert module.update_rank(0.45) == 3


@pytest.mark.parametrize("allocation", ["magnitude", "importance"])
def test_measured_scores(allocation):
    module = made("scores", rank_allocation=allocation)
    assert module.current_rank == 8
    if allocation == "importance":
        with pytest.raises(ValueError, match=r"importance must have gradients for update_rank\(\)"):
            module.update_rank()
    with torch.no_grad():
        module.lora_B[:, [1, 4]] *= 1e-3
    module(torch.randn(6, 32)).square().sum().backward()
    assert module.update_rank() == 6 and module.active().logical_not().nonzero().view(-1).tolist() == [1, 4]
    assert module.rank_scores.max() == 1.0


def test_top_k_update_rank():
    module = made("top_k", min_rank=2)
    with torch.no_grad():
        module.importance.copy_(torch.tensor([0.1, 0.9, 0.9, 0.2, 0.9, 0.3, 0.9, 0.1]))
    assert module.update_rank(0.5) == 4 == module.current_rank == module.state_dict()["current_rank"]
    assert module.rank_mask.nonzero().view(-1).tolist() == [1, 2, 4, 6]
    assert module.update_rank(2.0) == 2 and module.rank_mask.nonzero().view(-1).tolist() == [1, 2]
    assert module.update_rank(-1.0) == 8
    literal = made("top_k", importance_grad=False)
    literal(torch.randn(2, 32)).sum().backward()
    assert literal.importance.grad is None


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("form", ["top_k", "scores", "svd"])
def test_compact_and_files(form, layout):
    module = made(form, layout=layout)
    kept = torch.tensor([True, False, True, True, False, False, True, False])
    module.keep_ranks(kept)
    x = torch.randn(3, 32)
    y, scaling = module(x), module.scaling
    state = copy.deepcopy(module.state_dict())
    fresh = made(form, layout=layout)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(x), y)
    assert module.compact() == 4 == module.rank == module.current_rank and module.scaling == scaling
    torch.testing.assert_close(module(x), y)
    assert 4 in module.lora_A.shape and module.lora_A.requires_grad
    full = made(form, layout=layout)
    full.load_state_dict(module.state_dict())
    torch.testing.assert_close(full(x), y)
    bad = {name: value for name, value in module.state_dict().items() if name != "lora_B"}
    full = made(form, layout=layout)
    before = copy.deepcopy(full.state_dict())
    with pytest.raises(RuntimeError):
        full.load_state_dict(bad)
    assert full.rank == 8 and full.state_dict()["lora_A"].shape == before["lora_A"].shape
    full.load_state_dict(state)
    torch.testing.assert_close(full(x), y)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: AdaLoRALayer(8, 8, rank=4), ValueError, "rank must be left out beside sizes by position"),
        (lambda: AdaLoRALayer(8, 8, adaptive_rank=True), ValueError, "adaptive_rank must be left out"),
        (lambda: AdaLoRALayer(input_dimension=8, output_dimension=8, max_rank=4), ValueError, "input_dimension must be left out beside max_rank"),
        (lambda: AdaLoRALinear(linear(), rank=4, min_rank=2), ValueError, "rank must be left out beside min_rank"),
        (lambda: AdaLoRALayer(8, 8, 4, 5), ValueError, "min_rank must be at most the rank, 4, got 5"),
        (lambda: AdaLoRALayer(8, 8, form="paper"), ValueError, "form must be one of None, top_k, scores, svd"),
        (lambda: AdaLoRALayer(input_dimension=8, output_dimension=8, rank_allocation="all"), ValueError, "rank_allocation must be one of uniform"),
        (lambda: AdaLoRALayer(8, 8, form="svd", min_rank=2), ValueError, "min_rank must be left out for form 'svd'"),
        (lambda: AdaLoRALayer(8, 8, form="svd", init="randn"), ValueError, "init must be None for form='svd'"),
        (lambda: made("svd").update_rank(0.5), ValueError, "form must be 'top_k' or 'scores'"),
        (lambda: AdaLoRALayer(8, 8, minrank=2), TypeError, r"minrank must be a known option.*min_rank\?"),
        (lambda: RankAllocator(nn.Linear(2, 2), total_step=9), ValueError, "model must hold AdaLoRA layers, got none"),
        (lambda: RankAllocator([made("svd")], 4, 6, total_step=9), ValueError, "init_rank must be the rank of '0', 8, got 6"),
        (lambda: RankAllocator([made("svd")], 4, tinit=5, tfinal=5, total_step=9), ValueError, "tinit must be below"),
        (lambda: RankAllocator([made("svd")], 9, total_step=9), ValueError, "target_rank must be at most"),
        (lambda: RankAllocator([made("svd")], 4, total_step=9).update(1), ValueError, "layer '0' must have gradients"),
        (lambda: RankAllocator([made("svd")], 4, total_step=9, beta1=1.0), ValueError, "beta1 must be in"),
        (lambda: RankAllocator([made("svd")], 4), TypeError, "total_step must be an integer"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def test_allocator_follows_peft():
    """Losses, rank patterns and lora_E of PEFT's AdaLoRA over a whole schedule, from the same weights and data."""
    peft = pytest.importorskip("peft", reason="PEFT is the peer of this test")
    torch.manual_seed(1)
    base = Small()
    schedule = {"tinit": 3, "tfinal": 5, "total_step": 24}
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, deltaT=2, lora_alpha=12, lora_dropout=0.0, target_modules=["fc1", "fc2", "fc3"],
        orth_reg_weight=0.5, **schedule,
    )  # fmt: skip
    peer = peft.get_peft_model(copy.deepcopy(base), config)
    ours = copy.deepcopy(base)
    for name in ("fc1", "fc2", "fc3"):
        setattr(ours, name, AdaLoRALinear(getattr(ours, name), rank=6, alpha=12, dropout=0.0, form="svd"))
        theirs = getattr(peer.base_model.model, name)
        with torch.no_grad():
            getattr(ours, name).lora_A.copy_(theirs.lora_A["default"])
            getattr(ours, name).lora_B.copy_(theirs.lora_B["default"])
    allocator = RankAllocator(ours, 2, 6, delta_t=2, **schedule)
    factors = [p for name, p in peer.named_parameters() if "lora_A" in name or "lora_B" in name]

    def regularised(factors):
        norms = [(p @ p.t() if p.shape[0] == 6 else p.t() @ p) - torch.eye(6) for p in factors]
        return sum(norm.norm() for norm in norms) / len(norms)

    torch.testing.assert_close(allocator.orthogonality_loss(), regularised(factors))
    x, target = torch.randn(32, 12), torch.randint(0, 5, (32,))
    runs = []
    for model, loss_of, update in (
        (peer, lambda: regularised(factors), peer.base_model.update_and_allocate),
        (ours, allocator.orthogonality_loss, allocator.update),
    ):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        losses, patterns = [], []
        for step in range(24):
            loss = nn.functional.cross_entropy(model(x), target) + 0.5 * loss_of()
            loss.backward()
            optimizer.step()
            update(step)
            optimizer.zero_grad()
            losses.append(loss.item())
            if model is ours:
                patterns.append([flag for name in ("fc1", "fc2", "fc3") for flag in allocator.rank_pattern()[name]])
            else:
                pattern = config.rank_pattern or {}
                patterns.append(
                    [flag for n in ("fc1", "fc2", "fc3") for key, v in pattern.items() if n in key for flag in v]
                    or [True] * 18
                )
        runs.append((losses, patterns))
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-4, atol=1e-5)
    assert runs[1][1] == runs[0][1]
    assert sum(runs[1][1][-1]) == 6 and sum(runs[1][1][0]) == 18
    for name in ("fc1", "fc2", "fc3"):
        theirs = getattr(peer.base_model.model, name).lora_E["default"]
        torch.testing.assert_close(getattr(ours, name).lora_E, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["top_k", "scores"])
def test_allocator_serves_gated_forms(form):
    layers = nn.ModuleList(made(form, rank=4, layout=layout) for layout in ("out_in", "in_out", "in_out"))
    allocator = RankAllocator(layers, 2, total_step=6)
    saved = None
    for step in range(7):
        for layer in layers:
            layer(torch.randn(4, 32)).square().sum().backward()
        allocator.update(step)
        if step == 3:
            saved = allocator.state_dict()
        layers.zero_grad()
    counts = [layer.current_rank for layer in layers]
    assert sum(counts) == 6 == sum(map(sum, allocator.rank_pattern().values()))
    assert all(layer.rank_mask.tolist() == allocator.rank_pattern()[str(i)] for i, layer in enumerate(layers))
    again = RankAllocator(layers, 2, total_step=6)
    again.load_state_dict(saved)
    assert again.state_dict()["averages"].keys() == saved["averages"].keys()
    with pytest.raises(ValueError, match="state must be of the same layers"):
        RankAllocator(list(layers)[:2], 2, total_step=6).load_state_dict(saved)
