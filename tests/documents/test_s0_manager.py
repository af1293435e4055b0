"""S0, an efficient fine-tuning module with its manager: its usage, and what is decided where it is wrong."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft import (
    AdaLoRALayer,
    EfficientFineTuningManager,
    LoRALayer,
    LoRALinear,
    PrefixTuning,
    PTuningEmbedding,
    apply_adalora_to_model,
    apply_lora_to_model,
    apply_prefix_tuning_to_model,
    apply_ptuning_to_model,
    prepend_prompt,
    share_lora,
)

D = 16


def encoder(batch_first=True, layers=2):
    """The document's model, small."""
    layer = nn.TransformerEncoderLayer(D, 4, 32, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=batch_first).eval()


def trained(manager):
    with torch.no_grad():
        for parameter in manager.get_trainable_parameters():
            parameter.normal_(std=0.3)
    return manager


def runs(module):
    """A list that grows by one at each forward of ``module``."""
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    return seen


# Usage


def test_lora_layer():
    layer = LoRALayer(input_dimension=D, output_dimension=12, rank=8, alpha=16.0, dropout_probability=0.1, bias=False)
    x = torch.randn(2, 10, D)
    assert layer(x).shape == (2, 10, 12) and not layer(x).any()
    assert layer.lora_A.shape == (8, D) and layer.lora_B.shape == (12, 8) and layer.scaling == 2.0
    for same in (LoRALayer(D, 12), LoRALayer(input_dim=D, output_dim=12, rank=8, alpha=16, dropout=0.1)):
        assert (same.rank, same.scaling, same.dropout_probability, same.layout) == (8, 2.0, 0.1, "out_in")


def test_lora_linear():
    original_layer = nn.Linear(D, 12)
    layer = LoRALinear(original_layer, rank=8, alpha=16, dropout_probability=0.1, bias=True)
    x = torch.randn(2, 10, D)
    torch.testing.assert_close(layer(x), original_layer(x))
    assert not layer.weight.requires_grad and layer.lora_bias.requires_grad


def test_manager_from_end_to_end(tmp_path):
    model, x = encoder(), torch.randn(3, 5, D)
    manager = EfficientFineTuningManager(model)
    manager.apply_lora(target_modules=["self_attn.out_proj", "linear2"], rank=4, alpha=8, dropout_probability=0.1)
    manager.apply_adalora(target_modules=["linear1"], rank=4, alpha=8, dropout_probability=0.1, bias=False,
                          adaptive_rank=True, rank_allocation="uniform")  # fmt: skip
    manager.apply_ptuning(num_virtual_tokens=3, embedding_dimension=D, hidden_dimension=8, dropout_probability=0.1)
    manager.apply_prefix_tuning(num_layers=2, num_heads=4, head_dimension=4, prefix_length=3, dropout_probability=0.1)
    assert list(manager.adalora_layers) == ["layers.0.linear1", "layers.1.linear1"]
    assert isinstance(manager.ptuning_embeddings, PTuningEmbedding) and manager.ptuning_embeddings(2).shape == (2, 3, D)
    assert isinstance(manager.prefix_tuning, PrefixTuning)
    parameters = manager.get_trainable_parameters()
    assert isinstance(parameters, list)
    assert manager.count_trainable_parameters() == sum(p.numel() for p in parameters)
    assert isinstance(manager.summary(), str)
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    for _ in range(2):
        optimizer.zero_grad()
        tokens = torch.cat([manager.ptuning_embeddings(3), x], 1)
        states = sum(
            state.square().sum() for layer in range(2) for state in manager.prefix_tuning.get_prefix_states(layer)
        )
        (model.train()(tokens).square().mean() + states).backward()
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    for name in ("adapters.pt", "adapters.safetensors"):
        manager.save_efficient_weights(str(tmp_path / name))
        twin = EfficientFineTuningManager(encoder())
        base = {key: value for key, value in model.state_dict().items() if key in before}
        twin.apply_lora(["self_attn.out_proj", "linear2"], 4, 8).apply_adalora(["linear1"], 4, 8)
        twin.apply_ptuning(3, D, 8).apply_prefix_tuning(2, 4, 4, 3)
        twin.model.load_state_dict(base, strict=False)
        twin.load_efficient_weights(str(tmp_path / name))
        with torch.no_grad():
            torch.testing.assert_close(twin.model.eval()(x), model.eval()(x))
        assert torch.equal(twin.ptuning_embeddings.eval()(1), manager.ptuning_embeddings.eval()(1))


def test_functions():
    """Each returns its manager; sizes that the document leaves out are the model's."""
    for function, options in (
        (apply_lora_to_model, {"target_modules": ["linear1"], "rank": 4}),
        (apply_adalora_to_model, {"target_modules": ["linear1"], "rank": 4}),
        (apply_ptuning_to_model, {"num_virtual_tokens": 20}),
        (apply_prefix_tuning_to_model, {"prefix_length": 20}),
    ):
        manager = function(encoder(), **options)
        assert isinstance(manager, EfficientFineTuningManager) and manager.count_trainable_parameters() > 0
    assert apply_ptuning_to_model(encoder(), num_virtual_tokens=20).ptuning_embeddings(2).shape == (2, 20, D)


# The decisions


@pytest.mark.parametrize("targets", [["self_attn.out_proj", "linear2"], ["linear2"]], ids=" ".join)
def test_decision_01_adapters_act_in_eval(targets):
    """torch calls no out_proj, and its encoder's fast path no linear2: the document's adapters would do nothing."""
    model, x = encoder(), torch.randn(3, 5, D)
    base = model(x)
    manager = EfficientFineTuningManager(model)
    manager.apply_lora(targets, rank=4, dropout_probability=0.0)
    torch.testing.assert_close(model(x), base)
    trained(manager)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    for options in ({}, {"src_key_padding_mask": padding}):
        y = model.train()(x, **options)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x, **options), y)
        assert (y - base).abs().max() > 0.1
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in manager.get_trainable_parameters())


def test_decision_02_ranks_by_score():
    """The document counts the scores over 0.1, and then takes the first ranks."""
    layer = AdaLoRALayer(input_dimension=D, output_dimension=12, rank=8, alpha=16.0, dropout_probability=0.0)
    with torch.no_grad():
        layer.rank_importance.copy_(torch.tensor([0.01, 0.02, 0.9, 0.8, 0.03, 0.7, 0.04, 0.05]))
        layer.lora_B.normal_()
    assert layer.active().nonzero().flatten().tolist() == [2, 3, 5] and layer.get_effective_rank() == 3
    x, kept = torch.randn(4, D), [2, 3, 5]
    want = 2.0 * (x @ layer.lora_A[kept].t() * layer.rank_importance[kept]) @ layer.lora_B[:, kept].t()
    torch.testing.assert_close(layer(x), want)
    with torch.no_grad():
        layer.rank_importance.mul_(0.01)
    assert layer.active().nonzero().flatten().tolist() == [2]  # the largest, whatever the threshold


@pytest.mark.parametrize("form", ["S0", "S4"])
def test_decision_03_scores_are_trained(form):
    """The document's scores are only compared: they have no gradient, and stay one for ever."""
    sizes = {"input_dimension": D, "output_dimension": 12} if form == "S0" else {"in_features": D, "out_features": 12}
    layer, literal = AdaLoRALayer(**sizes, dropout=0.0), AdaLoRALayer(**sizes, dropout=0.0, importance_grad=False)
    with torch.no_grad():
        layer.lora_B.normal_()
    literal.load_state_dict(layer.state_dict())
    x = torch.randn(4, D)
    torch.testing.assert_close(layer(x), literal(x))  # importance 1: every state that the document can reach
    layer(x).square().sum().backward()
    literal(x).square().sum().backward()
    assert layer.gains.grad.all() and literal.gains.grad is None


def test_decision_04_forward_waits_for_no_score(monkeypatch):
    """The document's ``.item()`` in forward stops the device once a layer and step."""
    layer = AdaLoRALayer(input_dimension=D, output_dimension=12)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):

        def refused(*_):
            raise AssertionError("a value was read")

        monkeypatch.setattr(torch.Tensor, name, refused)
    layer.active()
    layer.factors()
    monkeypatch.undo()
    assert isinstance(layer.get_effective_rank(), int)
    compiled = torch.compile(layer.eval(), fullgraph=True, backend="eager")
    assert compiled(torch.randn(2, D)).shape == (2, 12)
    with torch.no_grad():
        layer.rank_importance[3:].fill_(0.01)
        layer.lora_B.normal_()
    x = torch.randn(2, D)
    y = layer(x)
    assert layer.compact() == 3 and layer.lora_A.shape == (3, D)
    torch.testing.assert_close(layer(x), y)


def test_decision_05_ties_and_state():
    """topk leaves equal scores to chance, and the document's state dict forgets the rank."""
    layer = AdaLoRALayer(D, 12, max_rank=16, min_rank=4)
    assert layer.update_rank(0.5) == 16 and layer.update_rank(1.0) == 4
    assert layer.active().nonzero().flatten().tolist() == [0, 1, 2, 3]
    fresh = AdaLoRALayer(D, 12, max_rank=16, min_rank=4)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.current_rank == 4 and torch.equal(fresh.active(), layer.active())
    # A rank that does not act has no gradient.
    layer(torch.randn(3, D)).sum().backward()
    assert not layer.lora_B.grad[4:].any() and not layer.lora_A.grad[:, 4:].any()


def test_decision_06_prompt_signatures():
    """The document's usage passes what its classes reject, and its states have another shape than it says."""
    ptuning = PTuningEmbedding(
        num_virtual_tokens=20, embedding_dimension=D, hidden_dimension=8, dropout_probability=0.1
    )
    assert ptuning(4).shape == (4, 20, D) and PTuningEmbedding(20, D, 8)(1).shape == (1, 20, D)
    prefix = PrefixTuning(num_layers=12, num_heads=12, head_dimension=64, prefix_length=20, dropout_probability=0.1)
    key, value = prefix.get_prefix_states(3)
    assert key.shape == value.shape == (20, 12, 64)
    assert (prefix.num_heads, prefix.head_dimension, prefix.prefix_length) == (12, 64, 20)
    halves = prefix.eval().prefix_embeddings[3].chunk(2, -1)
    assert torch.equal(prefix.get_prefix_states(3)[0].flatten(1), halves[0])


def test_decision_07_encoder_runs_once():
    """The document's MLP computes B identical rows; ours one, and dropout still hides other elements of each sample."""
    prompt = PTuningEmbedding(5, D, 8, dropout_probability=0.5)
    seen = []
    prompt.mlp[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    rows = prompt.eval()(64)
    assert seen == [(5, 8)] and (rows == rows[0]).all() and rows.stride(0) == 0
    rows = prompt.train()(2)
    assert not torch.equal(rows[0] == 0, rows[1] == 0)


@pytest.mark.parametrize("batch_first", [False, True])
def test_decision_08_virtual_tokens_are_tokens(batch_first):
    """The document's concatenation on dimension 1 makes further samples, which no token ever sees."""
    model, prompt = encoder(batch_first, layers=1), PTuningEmbedding(3, D, 8).eval()
    x = torch.randn(2, 5, D) if batch_first else torch.randn(5, 2, D)
    tokens = prepend_prompt(prompt, x, model=model).embeddings
    assert tokens.shape == ((2, 8, D) if batch_first else (8, 2, D))
    real = (slice(None), slice(3, None)) if batch_first else (slice(3, None),)
    assert not torch.allclose(model(tokens)[real], model(x), atol=1e-3)  # they are seen
    with pytest.raises(ValueError, match="batch_first"):
        prepend_prompt(prompt, x)


def test_decision_09_masks_and_labels_grow():
    prompt, labels = PTuningEmbedding(3, D, 8), torch.randint(0, 7, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    out = prepend_prompt(prompt, torch.randn(2, 5, D), batch_first=True, attention_mask=mask, labels=labels,
                         position_ids=torch.arange(5).unsqueeze(0), key_padding_mask=mask == 0)  # fmt: skip
    assert out.labels.tolist() == [[-100] * 3 + row for row in labels.tolist()]
    assert out.attention_mask.tolist() == [[1] * 8, [1] * 6 + [0] * 2]
    assert torch.equal(out.key_padding_mask, out.attention_mask == 0)
    assert out.position_ids.tolist() == [list(range(8))]
    logits = torch.randn(2, 8, 7)
    assert torch.equal(F.cross_entropy(logits.transpose(1, 2), out.labels),
                       F.cross_entropy(logits[:, 3:].transpose(1, 2), labels))  # fmt: skip


def test_decision_10_shared_adapters():
    """The document's loop makes a layer its own child, so that state_dict() recurses without end, and calls nothing."""
    manager = EfficientFineTuningManager(encoder()).apply_lora("linear1", rank=4, dropout_probability=0.0)
    before = manager.count_trainable_parameters()
    layers = [layer.linear1 for layer in manager.model.layers]
    share_lora(layers)
    assert layers[0].lora_A is layers[1].lora_A and manager.count_trainable_parameters() == before // 2
    trained(manager)
    state = manager.model.state_dict()
    manager.model.train().to(torch.float64).to(torch.float32)
    manager.model(torch.randn(2, 5, D)).square().sum().backward()
    assert layers[0].lora_A.grad.any() and layers[1].lora_B.grad is layers[0].lora_B.grad
    for twin in (copy.deepcopy(manager.model), manager.model):
        twin.load_state_dict(state)
        assert twin.layers[0].linear1.lora_B is twin.layers[1].linear1.lora_B
    with pytest.raises(ValueError, match="share_lora: lora_A must be as the first"):
        share_lora([LoRALayer(D, 12, rank=2), LoRALayer(D, 12, rank=4)])


def test_decision_11_amp():
    """fp16 adapters under a GradScaler raise in the document's loop: adapters stay in fp32, and so do their gradients."""
    layer = LoRALinear(nn.Linear(D, 12, dtype=torch.float16), rank=4)
    assert layer.lora_A.dtype == torch.float32
    model = nn.Sequential(LoRALinear(nn.Linear(D, 12), rank=4), nn.Linear(12, 3))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.AdamW(parameters), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = model[0].lora_B.clone()
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.randn(4, D))
            assert y.dtype == torch.bfloat16
            loss = y.float().square().mean()
        scaler.scale(loss).backward()
        assert all(p.grad.dtype == torch.float32 for p in parameters)
        scaler.step(optimizer)
        scaler.update()
    assert not torch.equal(model[0].lora_B, before)
    layer(torch.randn(4, D, dtype=torch.float16)).sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_decision_12_checkpointing(use_reentrant):
    """With frozen inputs the document's reentrant checkpoint has nothing to differentiate; and masks are drawn again."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.gradient_checkpointing = nn.Embedding(9, D), False
            self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                if self.gradient_checkpointing:
                    x = checkpoint(block, x, use_reentrant=use_reentrant)
                else:
                    x = block(x)
            return x

    manager, ids = EfficientFineTuningManager(Model()), torch.arange(6).view(2, 3)
    trained(manager.apply_lora("blocks", rank=4, dropout_probability=0.5))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            manager.gradient_checkpointing_enable(use_reentrant=use_reentrant)
            assert manager.model.gradient_checkpointing
        manager.model.zero_grad()
        torch.manual_seed(3)
        manager.model.train()(ids).square().sum().backward()
        gradients.append([p.grad.clone() for p in manager.get_trainable_parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(plain, again)


def test_decision_13_bias_and_dropout():
    """bias is LoRA's own and trained, never the base's; dropout hides elements of the input of A."""
    layer = LoRALinear(nn.Linear(D, 12), rank=4, alpha=8, dropout_probability=0.5, bias=True)
    assert layer.lora_bias.requires_grad and not layer.bias.requires_grad and not layer.lora_bias.any()
    assert LoRALinear(nn.Linear(D, 12), rank=4).lora_bias is None
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_bias.normal_()
        layer.lora_A.copy_(torch.eye(4, D))
    x = torch.ones(1, D)
    layer.eval()
    base = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), base + 2.0 * (layer.lora_B.sum(1) + layer.lora_bias))
    update = (layer.train()(x) - base) / 2.0 - layer.lora_bias
    coefficients = torch.linalg.lstsq(layer.lora_B, update.t()).solution.flatten()
    assert all(min(abs(c), abs(c - 2)) < 1e-3 for c in coefficients.tolist())  # each element: hidden, or twice as large


def test_decision_14_allocations():
    """The three names of rank_allocation, which the document leaves undefined."""
    made = {}
    for name in ("uniform", "importance", "magnitude"):
        torch.manual_seed(0)
        layer = AdaLoRALayer(input_dimension=D, output_dimension=12, rank=4, dropout=0.0, rank_allocation=name)
        assert layer.get_effective_rank() == 4
        with torch.no_grad():
            layer.lora_B.normal_()
            layer.lora_B[:, 1] *= 1e-3
        layer(torch.randn(5, D)).square().sum().backward()
        assert layer.update_rank(0.1) == layer.get_effective_rank()
        made[name] = layer
    assert made["uniform"].active().all()
    size = made["magnitude"].lora_A.norm(dim=1) * made["magnitude"].lora_B.norm(dim=0)
    assert torch.equal(made["magnitude"].active(), size / size.max() > 0.1) and not made["magnitude"].active()[1]
    assert not made["importance"].active()[1]
    with pytest.raises(ValueError, match="rank_allocation must be one of uniform, importance, magnitude"):
        AdaLoRALayer(input_dimension=D, output_dimension=12, rank_allocation="even")


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("layers.0.linear1", ["layers.0.linear1"]),
        (["linear1"], ["layers.0.linear1", "layers.1.linear1"]),
        (r"layers\.1\.linear\d", ["layers.1.linear1", "layers.1.linear2"]),
        (["layers.0"], ["layers.0.linear1", "layers.0.linear2", "layers.0.self_attn"]),
    ],
    ids=["exact", "suffix", "regex", "container"],
)
def test_decision_15_targets(targets, found):
    """The document mixes suffixes with names of containers, and silently adapts nothing where none matches."""
    manager = EfficientFineTuningManager(encoder()).apply_lora(targets, rank=2)
    paths = {entry.path.removesuffix(".in_proj").removesuffix(".out_proj") for entry in manager.entries}
    assert sorted(paths) == found
    for wrong in ("linear3", ["linear1", "liner2"]):
        model = encoder()
        with pytest.raises(ValueError, match=r"target_modules must match .*linear"):
            EfficientFineTuningManager(model).apply_lora(wrong)
        assert (
            not any(isinstance(m, LoRALinear) for m in model.modules()) and model.layers[0].linear1.weight.requires_grad
        )


def test_decision_16_numbers_and_no_score():
    """The document's efficiency_score adds figures of unlike units; the share of trained parameters is one."""
    manager = apply_lora_to_model(encoder(), ["linear1"], rank=4)
    ours, total = manager.count_trainable_parameters(), sum(p.numel() for p in manager.model.parameters())
    assert ours == 2 * 4 * (D + 32)
    assert f"{ours:,} of {total:,}" in manager.summary() and f"{100 * ours / total:.3f}" in manager.summary()
    assert not any("efficiency_score" in name for name, _ in inspect.getmembers(manager))
    assert not hasattr(fastpeft, "efficiency_score")
