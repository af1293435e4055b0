"""The manager: what every method puts in, counts, switches, merges and takes out."""

import copy
import gc
import inspect
import weakref

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Adapter, EfficientFineTuningManager, LoRALinear, LoRAMultiheadAttention, share_lora
from fastpeft.nn.layers.stack import AdapterStack
from manager_cases import Small, assert_same, encoder, picture, train

METHODS = {
    "apply_lora": {"bias": True},
    "apply_qlora": {},
    "apply_adalora": {},
    "apply_sparse_lora": {"sparsity": 0.25},
    "apply_pruning_lora": {"prune_rate": 0.25},
    "apply_conditional_lora": {"num_tasks": 3},
    "apply_hyper_lora": {"task_embedding_dim": 5},
    "apply_attention_guided_lora": {"gate": "sigmoid"},
    "apply_adapter": {"target_modules": ["a", "b"]},
}
CONDITIONS = {"apply_conditional_lora": torch.tensor([0, 1, 2, -1]), "apply_hyper_lora": torch.ones(5)}
NO_MATRIX = {"apply_conditional_lora", "apply_hyper_lora", "apply_attention_guided_lora", "apply_adapter"}


def test_the_documents_own_example():
    x, model = torch.randn(3, 5, 16), encoder()
    with torch.no_grad():
        base = model.eval()(x)
    manager = EfficientFineTuningManager(model)
    manager.apply_lora(target_modules=["self_attn.out_proj", "linear2"], rank=8, alpha=16, dropout_probability=0.1)
    assert all(isinstance(layer.self_attn, LoRAMultiheadAttention) for layer in model.layers)
    # 2 layers, A and B: (16 + 16) · 8 at the attention, (32 + 16) · 8 at linear2
    assert manager.count_trainable_parameters() == 2 * 8 * (32 + 48)
    assert isinstance(manager.get_trainable_parameters(), list)
    total = sum(p.numel() for p in model.parameters())
    assert f"trainable 1,280 of {total:,} parameters" in manager.summary()
    with torch.no_grad():
        torch.testing.assert_close(model(x), base)  # torch's fast path rounds otherwise
    for layer in model.layers:  # p = 0
        layer.self_attn.out_proj.dropout_probability = layer.linear2.dropout_probability = 0.0
    train(manager)
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in manager.get_trainable_parameters())
    assert [n for n, p in model.named_parameters() if p.grad is not None and "lora" not in n] == []
    with torch.no_grad():
        trained = model(x)
        torch.testing.assert_close(model.eval()(x), trained)  # no fast path passes the adapters by
        assert (trained - base).abs().max() > 0.1
        padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])  # no nested tensors
        padded = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(model.train()(x, src_key_padding_mask=padding), padded)
        model.eval()
        assert torch.equal(manager.unload()(x), base)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert model.state_dict().keys() == encoder().state_dict().keys()


@pytest.mark.parametrize("method", METHODS)
def test_method(method):
    model, x = Small(), torch.randn(4, 8)
    base = copy.deepcopy(model)
    manager = getattr(fastpeft, f"{method}_to_model")(model, **METHODS[method])
    assert isinstance(manager, EfficientFineTuningManager) and manager.model is model
    with manager.task(CONDITIONS.get(method)):
        if method != "apply_qlora":
            assert torch.equal(model(x), base(x))
        train(manager)
        model(x).square().sum().backward()
        trained = manager.get_trainable_parameters()
        assert all(p.grad is not None for p in trained)  # none is unused: DDP
        assert manager.count_trainable_parameters() == sum(p.numel() for p in trained)
        first = model.eval()(x)
        # a second one of the kind on the same layers adds to it
        getattr(manager, method)(**METHODS[method])
        torch.testing.assert_close(model(x), first)
        assert manager.count_trainable_parameters() == 2 * sum(p.numel() for p in trained)
        train(manager)
        both = model(x)
        assert (both - first).abs().max() > 1e-3
        assert torch.equal(copy.deepcopy(model)(x), both)
        name = next(iter(manager.methods))
        with manager.disable():
            assert (model(x) - base(x)).abs().max() < (0.2 if method == "apply_qlora" else 1e-6)
        with manager.disable(name):
            assert (model(x) - both).abs().max() > 1e-3
        assert torch.equal(model(x), both)
        if method in NO_MATRIX:
            before = picture(model)
            with pytest.raises(ValueError, match=r"matrix|task"):
                manager.merge()
            assert_same(before, picture(model))
        elif method != "apply_qlora":
            assert manager.merge() is model
            torch.testing.assert_close(model(x), both)
            manager.unmerge()
            assert torch.equal(model(x), both)
        manager.delete(name)
        assert len(manager.methods) == 1
    assert manager.unload() is model
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())
    if method != "apply_qlora":
        assert torch.equal(model(x), base(x))


def test_functions_have_the_methods_signatures_and_docs():
    for name in [name for name in dir(EfficientFineTuningManager) if name.startswith("apply_")]:
        function, method = getattr(fastpeft, f"{name}_to_model"), getattr(EfficientFineTuningManager, name)
        assert list(inspect.signature(function).parameters)[1:] == list(inspect.signature(method).parameters)[1:]
        assert inspect.getdoc(method) and name in inspect.getdoc(function)


@pytest.mark.parametrize(
    ("method", "options", "error", "text"),
    [
        ("apply_lora", {"target_modules": ["a", "c"]}, ValueError, "got 'c': nothing matches"),
        ("apply_lora", {"r": 4}, TypeError, "did you mean rank?"),
        ("apply_lora", {"init": "pissa", "rank": 9}, ValueError, "rank must be at most"),
        ("apply_lora", {"adapter_name": "a.b"}, ValueError, "adapter_name must be a name without dots"),
        ("apply_lora", {"adapter_name": "items"}, ValueError, "adapter_name must be a name .* of no method"),
        ("apply_lora", {"adapter_name": 3}, TypeError, "adapter_name must be a string"),
        ("apply_lora", {"modules_to_save": ""}, ValueError, "modules_to_save must name modules of the model"),
        ("apply_lora", {"modules_to_save": "tail"}, ValueError, "modules_to_save must match modules of the model"),
        (
            "apply_lora",
            {"modules_to_save": "body", "target_modules": "a"},
            ValueError,
            "match more than modules_to_save",
        ),
        ("apply_adapter", {"target_modules": ["a", "b"], "kind": "parallel"}, ValueError, "name square layers"),
        ("apply_adapter", {"target_modules": "a", "kind": "serial"}, ValueError, "kind must be one of"),
        ("apply_conditional_lora", {}, TypeError, "num_tasks must be an integer"),
        ("apply_ptuning", {}, ValueError, "token_dim must be given for a model without a config"),
        ("apply_prefix_tuning", {}, ValueError, "num_layers must be given for a model without a config"),
    ],
)
def test_nothing_is_changed_after_an_error(method, options, error, text):
    model = Small()
    manager = EfficientFineTuningManager(model)
    before = picture(model)
    with pytest.raises(error, match=text):
        getattr(manager, method)(**options)
    assert_same(before, picture(model))
    assert manager.methods == {} and manager.entries == []
    assert manager.apply_lora(rank=2).count_trainable_parameters() > 0


def test_an_error_at_a_later_layer_undoes_the_earlier_ones():
    model = Small()
    model.body["b"].register_forward_hook(lambda *_: None)
    before = picture(model)
    with pytest.raises(ValueError, match="hooks"):
        EfficientFineTuningManager(model).apply_lora(rank=2, init="pissa")  # which takes its part out of the weight
    assert_same(before, picture(model))


def various():
    return nn.ModuleDict({"small": Small(), "conv": nn.Conv2d(4, 6, 3, padding=1), "lstm": nn.LSTM(6, 5),
                          "attention": nn.MultiheadAttention(8, 2)}).eval()  # fmt: skip


def outputs(model):
    x, y, z = torch.linspace(-1, 1, 32).view(4, 8), torch.ones(1, 4, 5, 5), torch.ones(3, 2, 6)
    return [model["small"](x), model["conv"](y), model["lstm"](z)[0], model["attention"](x, x, x)[0]]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "kaiming"])
def test_every_kind_of_layer_comes_back(init, merged):
    model = various()
    base, before = outputs(model), picture(model)
    manager = EfficientFineTuningManager(model)
    manager.apply_lora(["small", "conv", "lstm", "attention"], rank=2, init=init, dropout_probability=0.0)
    torch.testing.assert_close(outputs(model), base, atol=1e-5, rtol=1e-5)
    want = outputs(train(manager).model)
    if merged:
        manager.merge()
        torch.testing.assert_close(outputs(model), want, atol=1e-4, rtol=1e-4)
    manager.unload()
    torch.testing.assert_close(outputs(model), want if merged else base, atol=1e-4, rtol=1e-4)
    assert model.state_dict().keys() == various().state_dict().keys()
    if not merged:
        after = picture(model)
        assert all(torch.equal(after[1][name][1], value) for name, (_, value) in before[1].items())
    assert [type(m) for m in model.modules()] == [type(m) for m in various().modules()]


def test_a_rank_that_one_layer_cannot_serve_leaves_all_weights():
    model = various()
    before = picture(model)
    with pytest.raises(ValueError, match="rank must be at most"):
        EfficientFineTuningManager(model).apply_lora(["conv", "lstm", "attention", "a"], rank=6, init="pissa")
    assert_same(before, picture(model))


def test_an_untrained_importance_is_not_counted():
    manager = EfficientFineTuningManager(Small()).apply_adalora("a", rank=2, importance_grad=False)
    assert manager.count_trainable_parameters() == 32
    manager.switch("adalora")
    assert manager.count_trainable_parameters() == 32


def test_the_wide_weight_of_a_quantised_layer_is_not_kept():
    model = Small()
    weights = [weakref.ref(model.body[name].weight) for name in "ab"]
    manager = EfficientFineTuningManager(model).apply_qlora(rank=2)
    gc.collect()
    assert [weight() for weight in weights] == [None, None]
    assert manager.unload().body["a"].weight.requires_grad


def test_a_square_parallel_adapter():
    model, x = Small(), torch.randn(4, 8)
    manager = train(EfficientFineTuningManager(model).apply_adapter("a", kind="parallel", bottleneck=3))
    stack = model.body["a"]
    assert isinstance(stack, AdapterStack) and isinstance(manager.entries[0].module, Adapter)
    torch.testing.assert_close(stack(x), stack.layer(x) + stack.parallel["adapter"](x))


def test_adapters_behind_torchs_attention_and_mlp():
    x, model = torch.randn(3, 5, 16), encoder()
    with torch.no_grad():
        base = model.eval()(x)
    manager = EfficientFineTuningManager(model).apply_adapter(kind="houlsby", bottleneck=4)
    assert len(manager.entries) == 4
    with torch.no_grad():
        torch.testing.assert_close(model(x), base)
        train(manager)
        torch.testing.assert_close(model(x), model.train()(x))
        assert (model.eval()(x) - base).abs().max() > 0.1
        assert torch.equal(manager.unload()(x), base)


@pytest.mark.parametrize("method", ["apply_qlora", "apply_adalora", "apply_sparse_lora", "apply_adapter"])
def test_any_method_on_out_proj_beside_lora_on_the_inputs(method):
    x, model = torch.randn(3, 5, 16), encoder(batch_first=False)
    with torch.no_grad():
        base = model.eval()(x)
    manager = EfficientFineTuningManager(model)
    manager.apply_lora("layers.0.self_attn", rank=2, dropout_probability=0.0)
    # The base of a LoRALinear is not quantised afterwards.
    getattr(manager, method)("layers.1.self_attn.out_proj" if method == "apply_qlora" else "self_attn.out_proj")
    train(manager)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(model.train()(x), y) if method == "apply_adapter" else None
        assert (model.eval()(x) - base).abs().max() > 0.05
        manager.delete("lora")
        assert (model(x) - y).abs().max() > 1e-3
        manager.unload()
        assert type(model.layers[0].self_attn) is nn.MultiheadAttention
        torch.testing.assert_close(model(x), base, atol=0.3 if method == "apply_qlora" else 1e-6, rtol=0)


def test_recurrent_modules_and_a_second_lora_where_none_fits():
    model = nn.ModuleDict({"lstm": nn.LSTM(6, 5, batch_first=True), "cell": nn.GRUCell(5, 5)})
    x = torch.randn(2, 4, 6)
    base = model["lstm"](x)[0]
    manager = train(EfficientFineTuningManager(model).apply_lora(["lstm", "cell"], rank=2, dropout_probability=0.0))
    y = model["lstm"](x)[0]
    assert (y - base).abs().max() > 1e-2
    manager.merge()
    torch.testing.assert_close(model["lstm"](x)[0], y)
    manager.unmerge()
    before = picture(model)
    with pytest.raises(ValueError, match="got 'lstm': LoRALSTM"):
        manager.apply_lora("lstm")
    assert_same(before, picture(model))
    assert type(manager.unload()["lstm"]) is nn.LSTM
    assert torch.equal(model["lstm"](x)[0], base)


def test_an_attention_takes_no_second_lora_on_its_inputs():
    manager = EfficientFineTuningManager(encoder()).apply_lora("self_attn", rank=2)
    before = picture(manager.model)
    with pytest.raises(ValueError, match="name attentions without adapters"):
        manager.apply_lora("self_attn", rank=2)
    assert_same(before, picture(manager.model))


def test_merged_and_unloaded():
    model, x = encoder().eval(), torch.randn(2, 4, 16)
    manager = EfficientFineTuningManager(model).apply_lora(["self_attn", "linear2"], rank=2)
    manager.apply_adalora("linear2", rank=2).apply_sparse_lora("out_proj", rank=2)
    train(manager)
    with torch.no_grad():
        want = model(x)
        manager.merge()
        torch.testing.assert_close(model(x), want)
        manager.unload()
        torch.testing.assert_close(model(x), want)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention and type(model.layers[0].linear2) is nn.Linear
    assert model.state_dict().keys() == encoder().state_dict().keys()


def test_switch():
    model, x = Small().eval(), torch.randn(4, 8)
    manager = train(EfficientFineTuningManager(model).apply_lora(rank=2, adapter_name="one"))
    one = model(x)
    manager.apply_lora("b", rank=3, adapter_name="two")
    train(manager)
    manager.switch("two")
    assert manager.count_trainable_parameters() == 3 * 20
    manager.merge()  # of what acts
    manager.switch(["one"])
    assert manager.count_trainable_parameters() == 2 * 16 + 2 * 20
    assert one.shape == model(x).shape and not any(unit.merged for unit in manager._units(manager.entries))
    with pytest.raises(ValueError, match=r"adapter must be one of \['one', 'two'\], got 'three'"):
        manager.switch("three")


def test_a_merged_layer_gets_no_further_adapter():
    model = Small().eval()
    manager = train(EfficientFineTuningManager(model).apply_lora(rank=2))
    manager.merge()
    before = picture(model)
    with pytest.raises(ValueError, match=r"model must be unmerged where it gets a further adapter, got \['body.b'\]"):
        manager.apply_adalora("b", rank=2)
    assert_same(before, picture(model))
    assert manager.merge() is model  # again: nothing to do
    manager.unmerge()
    manager.disable()
    assert_same(picture(manager.merge()), picture(model))


def test_combine_is_exact():
    model, x = Small().eval(), torch.randn(4, 8)
    manager = EfficientFineTuningManager(model).apply_lora(rank=2, bias=True, adapter_name="one")
    manager.apply_adalora("b", rank=3, adapter_name="two")
    train(manager)
    layers = {"a": manager.entries[0].module, "b": manager.entries[1].module}
    want = {"a": 0.5 * layers["a"].delta_weight(), "b": 0.5 * layers["b"].delta_weight()}
    want["b"] = want["b"] - 2 * manager.adalora_layers["body.b"].delta_weight()
    manager.combine(["one", "two"], [0.5, -2.0], "both")
    made = {entry.path: entry.module for entry in manager._of("both")}
    assert [module.rank for module in made.values()] == [2, 5]
    for name, delta in want.items():
        torch.testing.assert_close(made[f"body.{name}"].delta_weight(), delta)
    assert manager.count_trainable_parameters() == sum(p.numel() for m in made.values() for p in m.parameters())
    b = layers["b"]
    hidden = torch.randn(4, 8)
    plain = nn.functional.linear(hidden, b.weight, b.bias) + hidden @ want["b"].t() + 0.5 * b.scaling * b.lora_bias
    torch.testing.assert_close(model.body["b"](hidden), plain)
    manager.apply_attention_guided_lora("a", adapter_name="gate")
    before = picture(model)
    for names, text in ((["one", "gate"], "one matrix"), (["one", "one"], "be different"), ([], "be different")):
        with pytest.raises(ValueError, match=text):
            manager.combine(names, adapter_name="more")
    assert_same(before, picture(model))
    assert model(x).shape == (4, 3)


def test_modules_to_save():
    model = Small()
    manager = EfficientFineTuningManager(model).apply_lora(r".*\.b|head", rank=2, modules_to_save=["head"])
    assert type(model.head) is nn.Linear and [entry.path for entry in manager.entries] == ["body.b"]
    assert manager.count_trainable_parameters() == 2 * 20 + 39
    assert "trained whole" in manager.summary()
    with pytest.raises(ValueError, match="name modules without adapters"):
        manager.apply_lora("a", modules_to_save="body")


def test_a_deepcopy_of_the_manager_manages_its_own_model():
    manager = train(EfficientFineTuningManager(encoder().eval()).apply_lora(rank=2).apply_adalora("linear2", rank=2))
    x = torch.randn(2, 3, 16)
    want = manager.model(x)
    other = copy.deepcopy(manager)
    assert torch.equal(other.model(x), want)
    other.unload()
    assert type(other.model.layers[0].linear2) is nn.Linear
    assert torch.equal(manager.model(x), want) and len(manager.methods) == 2


def test_two_managers_of_one_model():
    model = Small()
    one = fastpeft.apply_lora_to_model(model, ["a", "b"], rank=2)
    two = fastpeft.apply_adalora_to_model(model, ["b"], rank=2)
    assert one.count_trainable_parameters() == two.count_trainable_parameters() == 72 + 42
    two.unload()
    one.unload()
    assert type(model.body["b"]) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_other_layers_that_are_linear():
    """A subclass of nn.Linear with a forward of its own, as bitsandbytes', is left and gets its adapter beside it."""

    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model, x = nn.Sequential(Own(4, 4), nn.ReLU()), torch.randn(2, 4)
    base = model[0](x)
    manager = train(EfficientFineTuningManager(model).apply_lora("0", rank=2, dropout_probability=0.0))
    torch.testing.assert_close(model[0](x), base + manager.entries[0].module(x))
    with pytest.raises(ValueError, match=r"layer must be an nn\.Linear or a LoRA layer"):
        manager.merge()
    assert type(manager.unload()[0]) is Own


def test_share_lora():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    manager = EfficientFineTuningManager(model).apply_lora(["0", "1"], rank=2, dropout_probability=0.0)
    share_lora([model[0], model[1]])
    assert model[0].lora_A is model[1].lora_A and model[0].weight is not model[1].weight
    assert manager.count_trainable_parameters() == 32 and len(manager.get_trainable_parameters()) == 2
    twin = copy.deepcopy(model)
    assert twin[0].lora_B is twin[1].lora_B
    train(manager)
    model(torch.randn(2, 8)).sum().backward()
    assert model[0].lora_A.grad is model[1].lora_A.grad


@pytest.mark.parametrize(
    ("modules", "error", "text"),
    [
        (lambda: [LoRALinear(nn.Linear(8, 8))], ValueError, "two or more, got 1"),
        (lambda: [LoRALinear(nn.Linear(8, 8)), nn.Linear(8, 8)], TypeError, "must be LoRA modules, got Linear"),
        (
            lambda: [LoRALinear(nn.Linear(8, 8)), LoRALinear(nn.Linear(8, 9))],
            ValueError,
            r"lora_B must be as the first",
        ),
        (
            lambda: [LoRALinear(nn.Linear(8, 8)), LoRALinear(nn.Linear(8, 8), bias=True)],
            ValueError,
            "lora_bias must be",
        ),
        (lambda: [LoRALinear(nn.Linear(8, 8)), LoRALinear(8, 8, rank=8)], ValueError, "layout must be"),
        (lambda: [fastpeft.HyperLoRALayer(8, 8), fastpeft.HyperLoRALayer(8, 8)], ValueError, "of their own"),
    ],
)
def test_share_lora_errors(modules, error, text):
    listed = modules()
    before = [dict(module._parameters) for module in listed]
    with pytest.raises(error, match=text):
        share_lora(listed)
    assert all(
        a is b
        for old, m in zip(before, listed, strict=True)
        for a, b in zip(old.values(), m._parameters.values(), strict=True)
    )


def test_a_shared_sparse_adapter_shares_its_masks():
    layers = [fastpeft.SparseLoRALinear(nn.Linear(8, 8), rank=2) for _ in range(2)]
    share_lora(layers)
    assert torch.equal(layers[0].mask_A, layers[1].mask_A)
    layers[0].remask()
    layers[1].remask()
    assert (layers[0].lora_A == 0).sum() == (layers[0].mask_A == 0).sum()


def test_prompts_of_a_plain_model():
    model = encoder()
    manager = EfficientFineTuningManager(model).apply_ptuning(num_virtual_tokens=6)
    prompt = manager.ptuning_embeddings
    assert prompt(3).shape == (3, 6, 16)
    manager.apply_prefix_tuning(prefix_length=4).apply_prompt_tuning(num_virtual_tokens=5)
    assert manager.prefix_tuning.get_prefix_states(1)[0].shape == (4, 4, 4) and manager.prefix_tuning.num_layers == 2
    assert manager.prompt_embeddings(1).shape == (1, 5, 16)
    assert manager.count_trainable_parameters() == sum(
        p.numel() for m in (prompt, manager.prefix_tuning, manager.prompt_embeddings) for p in m.parameters()
    )
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="its update is no matrix"):
        manager.merge()
    manager.unload()
    assert manager.ptuning_embeddings is None and all(p.requires_grad for p in model.parameters())
