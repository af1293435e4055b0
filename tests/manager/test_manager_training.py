"""Managed models in training: checkpointing with frozen inputs, half precisions and a scaler, DDP, transformers."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft import EfficientFineTuningManager
from fastpeft.nn.layers.stack import AdapterStack
from manager_cases import Small, encoder, train


class Checkpointed(nn.Module):
    """The documents' form: an attribute that the forward looks at."""

    gradient_checkpointing = False
    use_reentrant = False

    def __init__(self, embeds):
        super().__init__()
        self.embed = nn.Embedding(10, 8) if embeds else None
        self.body = Small()

    def forward(self, x):
        x = x if self.embed is None else self.embed(x)
        if self.gradient_checkpointing:
            return checkpoint(self.body, x, use_reentrant=self.use_reentrant)
        return self.body(x)


def gradients(manager, x):
    manager.model.zero_grad()
    torch.manual_seed(3)  # dropout
    manager.model(x).square().sum().backward()
    return [p.grad.clone() for p in manager.get_trainable_parameters()]


@pytest.mark.parametrize("embeds", [True, False])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_a_plain_model(use_reentrant, embeds):
    model = Checkpointed(embeds).train()
    x = torch.arange(4) if embeds else torch.randn(4, 8)
    manager = train(EfficientFineTuningManager(model).apply_lora("body", rank=2, dropout_probability=0.3))
    want = gradients(manager, x)
    model.use_reentrant = use_reentrant
    manager.gradient_checkpointing_enable(use_reentrant=use_reentrant)
    manager.gradient_checkpointing_enable(use_reentrant=use_reentrant)  # a second time adds no hooks
    assert model.gradient_checkpointing and len(model._forward_pre_hooks) == int(use_reentrant)
    for mine, gold in zip(gradients(manager, x), want, strict=True):
        assert torch.equal(mine, gold)
    assert x.requires_grad is False
    with pytest.raises(ValueError, match="model must have gradient_checkpointing_enable"):
        EfficientFineTuningManager(Small()).gradient_checkpointing_enable()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_transformers(use_reentrant):
    prompt_cases = pytest.importorskip("prompt_cases")
    model = prompt_cases.model("llama").train()
    manager = EfficientFineTuningManager(model).apply_lora(["q_proj", "down_proj"], rank=2, dropout_probability=0.2)
    train(manager)
    ids = torch.tensor([[3, 4, 5, 6]])

    def loss():
        torch.manual_seed(3)
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in manager.get_trainable_parameters()]

    want = loss()
    manager.gradient_checkpointing_enable(use_reentrant=use_reentrant)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for mine, gold in zip(loss(), want, strict=True):
        torch.testing.assert_close(mine, gold)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_in_fp32_beside_a_half_base_under_autocast_and_a_scaler(dtype):
    model = Small(dtype)
    manager = EfficientFineTuningManager(model).apply_lora(rank=2).apply_adalora("b", rank=2).apply_adapter("a")
    assert {p.dtype for p in manager.get_trainable_parameters()} == {torch.float32}
    optimizer = torch.optim.SGD(train(manager).get_trainable_parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    before = [p.detach().clone() for p in manager.get_trainable_parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = model(torch.randn(4, 8)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    moved = [not torch.equal(p, old) for p, old in zip(manager.get_trainable_parameters(), before, strict=True)]
    assert all(moved) and all(p.dtype == dtype for p in model.head.parameters())


def test_ddp_finds_no_unused_parameter(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = encoder()
        manager = EfficientFineTuningManager(model).apply_lora(["self_attn", "linear2"], rank=2)
        manager.apply_adalora("linear2", rank=2, importance_grad=False, adapter_name="literal").apply_adapter("linear1")
        manager.apply_sparse_lora("linear1", rank=2, adapter_name="off").switch(["lora", "literal", "adapter"])
        ddp = nn.parallel.DistributedDataParallel(model)
        for _ in range(3):  # an unused parameter is an error of the second step
            ddp(torch.randn(2, 3, 16)).sum().backward()
        assert all(p.grad is not None for p in manager.get_trainable_parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_compile_of_a_managed_encoder():
    model, x = encoder().eval(), torch.randn(2, 3, 16)
    manager = EfficientFineTuningManager(model).apply_lora(rank=2).apply_adalora("out_proj", rank=2)
    train(manager.apply_adapter("self_attn"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_compile_without_a_graph_break():
    model, x = Small().eval(), torch.randn(4, 8)
    manager = EfficientFineTuningManager(model).apply_lora(rank=2).apply_adalora("b", rank=2).apply_adapter("a")
    train(manager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in manager.get_trainable_parameters())


def test_a_prefix_starts_from_text(tmp_path):
    """The tokens before others act as themselves; the file holds the values, so that the options need no tokenizer."""
    prompt_cases = pytest.importorskip("prompt_cases")
    base = prompt_cases.model("llama")
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    options = {"prefix_length": 2, "init": "text", "text": "a b", "tokenizer": lambda text: [3, 4]}
    manager = EfficientFineTuningManager(copy.deepcopy(base)).apply_prefix_tuning(**options)
    with torch.no_grad():
        y = manager.model(ids[:, 2:]).logits
        torch.testing.assert_close(y, base(ids).logits[:, 2:], rtol=1e-4, atol=1e-4)
        manager.save_efficient_weights(tmp_path / "a.pt")
        other = EfficientFineTuningManager(copy.deepcopy(base))
        other.load_efficient_weights(tmp_path / "a.pt")
        assert torch.equal(other.model(ids[:, 2:]).logits, y)
    with pytest.raises(ValueError, match="text must be given for init='text'"):
        EfficientFineTuningManager(copy.deepcopy(base)).apply_prefix_tuning(init="text")
    with pytest.raises(ValueError, match="init must be 'random' for a model that is not transformers'"):
        EfficientFineTuningManager(encoder()).apply_prefix_tuning(**options)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama"])
@pytest.mark.parametrize("method", ["ptuning", "prompt_tuning", "prefix_tuning"])
def test_prompts_of_transformers(name, method, tmp_path):
    prompt_cases = pytest.importorskip("prompt_cases")
    model = prompt_cases.model(name)
    flags = [p.requires_grad for p in model.parameters()]
    base = copy.deepcopy(model)
    length = {"prefix_length": 3} if method == "prefix_tuning" else {"num_virtual_tokens": 3}
    manager = getattr(fastpeft, f"apply_{method}_to_model")(model, **length)
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    inputs |= {"decoder_input_ids": torch.tensor([[3, 4]])} if name == "t5" else {}
    module = manager.entries[0].module
    assert manager.get_trainable_parameters() == list(module.parameters())
    with torch.no_grad():
        y = model(**inputs).logits
    model(**inputs).logits.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    manager.save_efficient_weights(tmp_path / "a.pt")
    other = EfficientFineTuningManager(copy.deepcopy(base))
    other.load_efficient_weights(tmp_path / "a.pt")
    with torch.no_grad():
        torch.testing.assert_close(other.model(**inputs).logits, y)
        with manager.disable():
            torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits)
        with pytest.raises(ValueError, match="its update is no matrix"):
            manager.merge()
        with pytest.raises(ValueError, match="no prompt or prefix yet"):
            manager.apply_ptuning(2)
        assert list(manager.methods) == [method]
        manager.apply_lora(rank=2)
        manager.unload()
        torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits)
    assert [p.requires_grad for p in model.parameters()] == flags and type(model) is type(base)


def test_prompt_tuning_starts_from_a_text():
    prompt_cases = pytest.importorskip("prompt_cases")
    model = prompt_cases.model("gpt2")
    manager = EfficientFineTuningManager(model)
    manager.apply_prompt_tuning(4, init="text", text="any", tokenizer=lambda text: {"input_ids": [5, 7]})
    rows = model.get_input_embeddings().weight[[5, 7, 5, 7]]
    assert torch.equal(manager.prompt_embeddings.encode(), rows)


def test_lora_of_transformers_conv1d_and_default_targets():
    prompt_cases = pytest.importorskip("prompt_cases")
    model = prompt_cases.model("gpt2")
    base = copy.deepcopy(model)
    manager = EfficientFineTuningManager(model).apply_lora("c_attn", rank=2, dropout_probability=0.0)
    stack = model.transformer.h[0].attn.c_attn
    assert isinstance(stack, AdapterStack) and len(manager.entries) == 2
    ids = {"input_ids": torch.tensor([[3, 4, 5]])}
    torch.testing.assert_close(model(**ids).logits, base(**ids).logits)
    train(manager)
    assert (model(**ids).logits - base(**ids).logits).abs().max() > 1e-3
    manager.unload()
    assert torch.equal(model(**ids).logits, base(**ids).logits)
    bert = EfficientFineTuningManager(prompt_cases.model("bert")).apply_lora(rank=2, modules_to_save="classifier")
    paths = [entry.path for entry in bert.entries]
    assert len(paths) == 12 and not any("classifier" in path for path in paths)
    houlsby = EfficientFineTuningManager(prompt_cases.model("bert")).apply_adapter()
    ends = sorted({entry.path.partition("layer.0.")[2] for entry in houlsby.entries} - {""})
    assert ends == ["attention.output.dense", "output.dense"] and len(houlsby.entries) == 4
    pfeiffer = EfficientFineTuningManager(prompt_cases.model("llama")).apply_adapter(kind="pfeiffer")
    assert [entry.path for entry in pfeiffer.entries] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
