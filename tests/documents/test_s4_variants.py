"""S4, fourteen slides of LoRA variants: their usage as the slides show it, and what is decided where they are wrong."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpeft
from fastpeft import (
    AdaLoRALayer,
    AttentionGuidedLoRALayer,
    AttentionGuidedLoRALinear,
    ConditionalLoRALayer,
    ConditionalLoRALinear,
    HyperLoRALayer,
    HyperLoRALinear,
    LoRAConv2d,
    LoRALayer,
    LoRALinear,
    LoRARNNCell,
    PruningAwareLoRALayer,
    PruningAwareLoRALinear,
    QLoRALinear,
    SparseLoRALayer,
    SparseLoRALinear,
)

I, O, E = 24, 20, 16
TASK = {"Conditional": (1,), "Hyper": (torch.linspace(-1, 1, E),)}
VARIANTS = ["LoRA", "AdaLoRA", "HyperLoRA", "ConditionalLoRA", "SparseLoRA", "PruningAwareLoRA", "AttentionGuidedLoRA"]


def made(variant, base, **options):
    tasks = {"num_tasks": 3} if variant == "ConditionalLoRA" else {}
    return getattr(fastpeft, variant + base)(in_features=I, out_features=O, **tasks, **options)


def condition(variant):
    return next((value for name, value in TASK.items() if variant.startswith(name)), ())


def moved(module):
    """B away from zero, where no mask hides it."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_().mul_(getattr(module, "mask_B", 1))
            elif name.startswith("hyper_net.2"):
                parameter.normal_(std=0.3)
    return module


def finite_steps(module, x, *beside, steps=2):
    """Training as the slides would: AdamW over all that is trained."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(x, *beside).square().mean().backward()
        optimizer.step()
    return module


# Every slide's class: conventions, and the life of a layer


@pytest.mark.parametrize("base", ["Layer", "Linear"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_conventions(variant, base):
    """Slide layout A (in, r) ~ N(0, 1), B (r, out) = 0, 0.01, no dropout; the identity, and at one price of options."""
    module = made(variant, base)
    rank = 16 if variant == "AdaLoRA" else 4
    assert (module.rank, module.layout, module.scaling, module.dropout_probability) == (rank, "in_out", 0.01, 0.0)
    if not variant.startswith("Hyper"):
        tasks = (3,) if variant.startswith("Cond") else ()
        assert module.lora_A.shape == (*tasks, I, rank) and module.lora_B.shape == (*tasks, rank, O)
        assert module.init == "randn" and not module.lora_B.any()
    x = torch.randn(3, I)
    y = module(x, *condition(variant))
    assert torch.equal(y, torch.zeros(3, O) if base == "Layer" else F.linear(x, module.weight, module.bias))
    module = made(variant, base, alpha=8.0, dropout=0.2, bias=True)
    assert module.dropout_probability == 0.2 and module.scaling == 8.0 / module.rank and module.lora_bias is not None
    for wrong, meant in (("r", "rank"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout")):
        with pytest.raises(TypeError, match=f"{wrong} must be a known option.* did you mean {meant}"):
            made(variant, base, **{wrong: 1})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_precision(variant, dtype):
    """Empty batches, one row, strided rows, fp32 adapters on a half-precision base, half-precision adapters, autocast."""
    beside = condition(variant)
    for options in ({"adapter_dtype": torch.float32}, {"adapter_dtype": dtype}):
        module = moved(made(variant, "Linear", dtype=dtype, bias=True, **options))
        for shape in ((I,), (0, I), (1, I), (2, 3, I), (2, 0, I)):
            x = torch.randn(shape, dtype=dtype).requires_grad_()
            y = module(x, *beside)
            assert y.shape == (*shape[:-1], O) and y.dtype == dtype
            y.sum().backward()
            assert x.grad.shape == x.shape and x.grad.dtype == dtype
        assert all(p.grad.dtype == options["adapter_dtype"] for p in module.parameters() if p.requires_grad)
        x = torch.randn(I, 5, dtype=dtype).t()
        torch.testing.assert_close(module(x, *beside), module(x.contiguous(), *beside), rtol=0.05, atol=0.05)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(torch.randn(2, I), *beside).dtype == torch.bfloat16


@pytest.mark.parametrize("rank", [1, 256])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_rank(variant, rank):
    options = {"max_rank" if variant == "AdaLoRA" else "rank": rank}
    options |= {"gate": "sigmoid"} if variant.startswith("Att") and rank == 1 else {}
    finite_steps(made(variant, "Layer", **options), torch.randn(3, I), *condition(variant))


def test_usage():
    """Positions as the slides have them."""
    x = torch.randn(2, 10, I)
    assert LoRALayer(I, O, rank=4)(x).shape == LoRALinear(I, O, rank=4)(x).shape == (2, 10, O)
    assert LoRALinear(I, O, 4).rank == AttentionGuidedLoRALayer(I, O, 4).rank == HyperLoRALayer(I, O, 4, 8).rank == 4
    ada = AdaLoRALayer(I, O, 8, 2)
    assert (ada.max_rank, ada.min_rank, ada.current_rank) == (8, 2, 8)
    assert AdaLoRALayer(I, O, max_rank=16, min_rank=4).get_effective_rank() == 16
    assert QLoRALinear(64, O, 4, 4)(torch.randn(2, 64)).shape == (2, O)
    assert LoRAConv2d(3, 8, 3, 4, 1, 1)(torch.randn(2, 3, 9, 9)).shape == (2, 8, 9, 9)
    assert LoRAConv2d(3, 8, kernel_size=3, rank=4, stride=2, padding=1)(torch.randn(2, 3, 9, 9)).shape == (2, 8, 5, 5)
    assert LoRARNNCell(I, O, rank=4)(torch.randn(3, I), torch.randn(3, O)).shape == (3, O)
    conditional = ConditionalLoRALinear(I, O, 3, 4)
    assert conditional(x, 2).shape == conditional(x, task_id=torch.tensor([0, 2])).shape == (2, 10, O)
    hyper = HyperLoRALinear(I, O)
    assert hyper(x, torch.randn(1, 16)).shape == hyper(x, task_embedding=torch.randn(2, 16)).shape == (2, 10, O)
    sparse = SparseLoRALayer(I, O, 4, 0.5)
    sparse.apply_sparsity(0.75)
    assert sparse(x).shape == (2, 10, O) and sparse.mask_A.shape == (I, 4) and sparse.mask_B.shape == (4, O)
    pruned = PruningAwareLoRALayer(I, O, 4, 0.5)
    pruned.prune()
    assert pruned(x).shape == (2, 10, O)


def test_merged_is_unmerged_or_said():
    x = torch.randn(3, I)
    for variant in VARIANTS:
        module, beside = moved(made(variant, "Linear", scaling=0.3)).eval(), condition(variant)
        y, weight = module(x, *beside), module.weight.clone()
        if variant.startswith("Att"):
            with pytest.raises(ValueError, match="one matrix"):
                module.merge()
            assert torch.equal(module.weight, weight)
            continue
        if beside:
            with pytest.raises(ValueError, match="must be given"):
                module.merge()
        module.merge(*beside)
        torch.testing.assert_close(module(x, *beside), y, rtol=1e-4, atol=1e-4)
        module.unmerge()
        assert torch.equal(module.weight, weight)


# The decisions


def test_decision_32_base_kept_and_frozen():
    """The slide's LoRALinear is a new random nn.Linear, of which everything is trained."""
    layer = nn.Linear(I, O)
    before = copy.deepcopy(layer.state_dict())
    for module in (LoRALinear.from_linear(layer), SparseLoRALinear.from_linear(layer), LoRALinear(I, O, rank=4)):
        finite_steps(module, torch.randn(5, I))
        assert {name for name, p in module.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    assert sum(p.numel() for p in LoRALinear(768, 768, rank=4, device="meta").parameters() if p.requires_grad) == 6144


def bert(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, **options)  # fmt: skip
    return transformers.BertModel(config).eval()


def tokens():
    ids = torch.arange(10).view(2, 5) + 1
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}


def test_decision_33_bert_in_place():
    """The slide puts 768 × 768 where 3072 → 768 belongs, throws the pretrained weights away and freezes nothing."""
    base = bert()
    want = base(**tokens()).last_hidden_state
    model = fastpeft.models.LoRABERT(base, rank=4)
    assert torch.equal(model(**tokens()).last_hidden_state, want)
    assert model.bert.encoder.layer[0].output.dense.lora_A.shape == (24, 4)
    share = model.count_trainable_parameters() / model.count_parameters()
    assert 0 < share < 0.3 and all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_decision_34_qlora_quantises_at_construction():
    """The slide's layer asserts until it is moved, ignores bits, is FP4, and drops the bias of random weights."""
    layer = nn.Linear(64, 8)
    module = QLoRALinear.from_linear(layer)
    assert module.quant_type == "nf4" and module.weight_4bit().double_quant and torch.equal(module.bias, layer.bias)
    x = torch.randn(3, 64)
    torch.testing.assert_close(module.eval()(x), layer(x), rtol=0.3, atol=0.3)
    assert (module.dequantize() - layer.weight).norm() < 0.15 * layer.weight.norm()
    for bits in (8, 3):
        with pytest.raises(ValueError, match=f"bits must be 4.*got {bits}"):
            QLoRALinear(64, 8, bits=bits)


@pytest.mark.parametrize(
    ("channels", "kernel", "options"),
    [(64, 3, {}), (9, 3, {}), (9, 3, {"padding": 1}), (4, 1, {"stride": 2}), (6, (3, 1), {"dilation": 2, "groups": 2})],
)
def test_decision_35_convolution_of_the_product(channels, kernel, options):
    """The slide's fold raises for most shapes, and for nine output channels it broadcasts a wrong result."""
    module = moved(LoRAConv2d(4, channels, kernel, rank=3, **options))
    x = torch.randn(2, 4, 8, 8)
    update = 0.01 * (module.lora_B @ module.lora_A).view_as(module.weight)
    torch.testing.assert_close(module(x), F.conv2d(x, module.weight + update, module.bias, **options))
    assert module.lora_A.shape == (3, module.weight[0].numel()) and module.lora_B.shape == (channels, 3)


def test_decision_36_one_tanh():
    """The slide's cell is tanh of the base's tanh, so that it changes every output before any training."""
    cell = nn.RNNCell(I, O)
    module = LoRARNNCell.from_cell(cell, rank=2)
    x, h = 5 * torch.randn(3, I), torch.randn(3, O)
    torch.testing.assert_close(module.eval()(x, h), cell(x, h))
    assert module(x, h).abs().max() > 0.7616  # tanh(1), beyond which the slide's cell never comes
    with torch.no_grad():
        for part in (module.lora_ih, module.lora_hh):
            part.lora_B.normal_()
    pre = F.linear(x, cell.weight_ih, cell.bias_ih) + F.linear(h, cell.weight_hh, cell.bias_hh)
    torch.testing.assert_close(module(x, h), torch.tanh(pre + module.lora_ih(x) + module.lora_hh(h)))


def test_decision_37_hypernetwork():
    """The slide raises on its own (1, 16) embedding, and is not the identity at init."""
    module, x = HyperLoRALinear(I, O), torch.randn(3, 5, I)
    base = F.linear(x, module.weight, module.bias)
    embeddings = torch.randn(3, E)
    for embedding in (embeddings[0], embeddings[:1], embeddings):
        assert torch.equal(module(x, embedding), base)
    moved(module)
    rows = torch.stack([module(x[n], embeddings[n]) for n in range(3)])
    torch.testing.assert_close(module(x, embeddings), rows)
    a, b = module.factors_of(embeddings[0])
    torch.testing.assert_close(module(x[0], embeddings[0]), base[0] + 0.01 * x[0] @ a.t() @ b.t())


def test_decision_38_shape_of_a_task():
    """The slide gives (1, 1, out) for one id, and all pairs of rows and tasks for one id a row."""
    module = moved(ConditionalLoRALayer(I, O, num_tasks=3))
    x, ids = torch.randn(4, I), torch.tensor([2, 0, -1, 1])
    want = torch.stack([module(row, int(task)) for row, task in zip(x, ids, strict=True)])
    torch.testing.assert_close(module(x, ids), want)
    assert not module(x, -1).any()
    for task in (1, torch.tensor(1), torch.tensor([1])):
        assert module(x, task).shape == (4, O)
    sequences = torch.randn(4, 3, I)
    assert module(sequences, ids).shape == module(sequences, ids.unsqueeze(1).expand(4, 3)).shape == (4, 3, O)
    for ids, error in ((3, ValueError), (-2, ValueError), (torch.tensor([0, 1, 2, 3]), ValueError), (1.0, TypeError)):
        with pytest.raises(error):
            module(x, ids)
    # Nothing of a batch asks for a task: it still goes backward.
    module(x, -1).sum().backward()
    assert not module.lora_A.grad.any()


def test_decision_39_sparse_bits_and_zeros():
    """The slide's masks double the memory, and what they hide goes on moving under AdamW."""
    module = SparseLoRALinear(I, O, rank=8, sparsity=0.5)
    held = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    assert held <= 8 * (I + O + 14) / 8  # one bit an element, rows rounded up to bytes
    finite_steps(module, torch.randn(5, I), steps=20)
    assert module.lora_A.any() and not module.lora_A[module.mask_A == 0].any()
    assert not module.lora_B[module.mask_B == 0].any() and module.lora_B[module.mask_B == 1].all()
    before = module.mask_A
    module.apply_sparsity(0.9)
    assert not torch.equal(module.mask_A, before) and not module.lora_A[module.mask_A == 0].any()
    assert 0.75 < module.sparsity < 1.0


def test_decision_40_pruned_stays_pruned():
    """The slide's zeros grow again in one step of Adam, a second call finds nothing, and bf16 raises."""
    module = PruningAwareLoRALinear(I, O, rank=8, prune_rate=0.5)
    a = module.lora_A.detach().clone()
    module.prune()
    assert torch.equal(module.mask_A == 0, a.abs() < torch.quantile(a.abs(), 0.5)) and module.mask_B.all()
    finite_steps(module, torch.randn(5, I), steps=5)
    assert (module.lora_A == 0).sum() == I * 8 // 2
    module.prune()
    assert (module.lora_A == 0).sum() == I * 8 // 2  # the same share in all: nothing to do
    kept = module.mask_A
    module.prune(0.25)
    assert torch.equal(module.mask_A, kept)  # masks only grow
    assert module.prune(0.75) > 0.5 and (module.lora_A == 0).sum() == I * 8 * 3 // 4
    half = PruningAwareLoRALinear(I, O, rank=8, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    half.prune()
    assert 0.4 < (half.lora_A == 0).float().mean() < 0.6
    gradual = PruningAwareLoRALayer(I, O, rank=8, schedule=[0.25, 0.5])
    assert [(gradual.prune(), (gradual.mask_A == 0).sum().item())[1] for _ in range(3)] == [I * 2, I * 4, I * 4]
    large = PruningAwareLoRALayer(2**20, 2, rank=17)  # more elements than torch.quantile takes
    large.prune()
    assert abs((large.lora_A == 0).float().mean().item() - 0.5) < 1e-4


def test_decision_41_gate():
    """The slide's softmax divides the update by r, and over one rank it is 1 and learns nothing."""
    x = torch.randn(4, I)
    module = moved(AttentionGuidedLoRALayer(I, O, rank=4))
    gate = module.attention(x).softmax(-1)
    torch.testing.assert_close(module(x), 0.01 * ((gate * (x @ module.lora_A)) @ module.lora_B))
    scaled = AttentionGuidedLoRALayer(I, O, rank=4, gate_scale=4.0)
    scaled.load_state_dict(module.state_dict())
    torch.testing.assert_close(scaled(x), 4 * module(x))
    sigmoid = moved(AttentionGuidedLoRALayer(I, O, rank=1, gate="sigmoid"))
    sigmoid(x).sum().backward()
    assert sigmoid.attention.weight.grad.any()
    for kind in (AttentionGuidedLoRALayer, AttentionGuidedLoRALinear):
        with pytest.raises(ValueError, match="rank must be at least 2"):
            kind(I, O, rank=1)


def test_decision_42_sentiment():
    """The slide takes no token_type_ids, and trains BERT whole behind a random Linear."""
    base = bert()
    model = fastpeft.models.SentimentClassifier(base, num_classes=2)
    torch.testing.assert_close(model(**tokens()), model.classifier(base(**tokens()).pooler_output))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"classifier.weight", "classifier.bias"}
    assert sum("lora_A" in name for name in trained) == 6


def test_decision_43_convolutions_of_a_resnet():
    """The slide adapts no convolution, and trains everything behind a random Linear."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    features = net[:-1](x)
    model = fastpeft.models.LoRAResNet(num_classes=3, rank=4, model=net)
    assert isinstance(net[0], LoRAConv2d) and isinstance(net[3], LoRAConv2d)
    torch.testing.assert_close(model(x), net[-1](features))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"resnet.6.weight", "resnet.6.bias"}
