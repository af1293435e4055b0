"""S1, notes on PEFT: LoRA in BERT, adapters and their fusion, prompts, prefixes, P-tuning, and what is decided."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastpeft import (
    Adapter,
    AdapterFusion,
    LoRALayer,
    LoRALinear,
    PrefixEncoder,
    PromptEmbedding,
    PromptEncoder,
    PTuningEmbedding,
    freeze_body,
    insert_prefix,
    insert_prompt,
    remove_prompt,
)
from prompt_cases import HEAD, HEADS, LAYERS, P, batch, model, prefix, prompt, with_prompt


def count(module):
    return sum(p.numel() for p in module.parameters())


def tokenizer(text):
    return {"input_ids": [2 + ord(letter) % 30 for letter in text.replace(" ", "")]}


# Usage


def test_lora_in_bert():
    """The print-out: r = 16 and dropout 0.05 in query and value, the head trained, all else frozen."""
    bert = model("bert")
    freeze_body(bert, "classifier")
    for layer in bert.bert.encoder.layer:
        attention = layer.attention.self
        attention.query = LoRALinear(attention.query, rank=16, alpha=16, dropout_probability=0.05)
        attention.value = LoRALinear.from_linear(attention.value, rank=16, alpha=16, dropout=0.05)
    trained = {name.rpartition(".")[2] for name, p in bert.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "weight", "bias"}
    assert sum(p.requires_grad for p in bert.parameters()) == 2 * LAYERS * 2 + 2
    assert "rank=16" in repr(attention.query) and "dropout=0.05" in repr(attention.query)
    ids, mask, labels = batch("bert")
    bert.train()(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    assert attention.value.lora_B.grad.any() and attention.key.weight.grad is None


def test_adapter():
    """Down, nonlinearity, up, and the way around it: the identity at first; its three places and its parameters."""
    x = torch.randn(2, 5, 12)
    adapter = Adapter(12, 3, activation="gelu")
    assert torch.equal(adapter(x), x) and count(adapter) == 12 * 3 + 3 + 3 * 12 + 12
    with torch.no_grad():
        adapter.up.weight.normal_()
    torch.testing.assert_close(adapter(x), x + adapter.up(F.gelu(adapter.down(x))))
    parallel = Adapter(12, 3, kind="parallel", scale=4.0)
    parallel.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(parallel(x), 4.0 * (adapter(x) - x))
    assert Adapter(12, bottleneck=3, kind="pfeiffer")(x[:0]).shape == (0, 5, 12)
    adapter.disable()
    assert torch.equal(adapter(x), x)


def test_adapter_fusion_in_two_stages():
    """First each adapter alone, then the fusion over all of them, which are frozen by then: adapter input as query."""
    x, stages = torch.randn(8, 12), []
    for target in (torch.randn(8, 12), torch.randn(8, 12)):
        adapter = Adapter(12, 4)
        optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            F.mse_loss(adapter(x), target).backward()
            optimizer.step()
        stages.append(adapter)
    fusion, before = AdapterFusion(12, stages), copy.deepcopy(stages)
    assert {name for name, p in fusion.named_parameters() if p.requires_grad} == {
        "query.weight",
        "key.weight",
        "value.weight",
    }
    assert torch.equal(fusion.value.weight, torch.eye(12))
    deltas = torch.stack([adapter.delta(x) for adapter in stages], 1)
    p = (fusion.query(x).unsqueeze(1) * fusion.key(deltas)).sum(-1).softmax(-1)
    torch.testing.assert_close(fusion(x), x + (p.unsqueeze(-1) * fusion.value(deltas)).sum(1))
    optimizer = torch.optim.Adam([p for p in fusion.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        fusion(x).square().sum().backward()
        optimizer.step()
    for adapter, old in zip(stages, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), old.parameters(), strict=True))


def test_sizes():
    """The notes' figures for BERT: prefixes without and with a projection, and the LSTM of P-tuning."""
    sizes = {"num_layers": 12, "num_kv_heads": 12, "head_dim": 64, "device": "meta"}
    assert count(PrefixEncoder(20, **sizes)) == 368_640
    assert count(PrefixEncoder(20, projection_dim=768, **sizes)) == 14_780_160
    assert count(PromptEncoder(20, 768, encoder="lstm", hidden_size=768, device="meta")) == 27_174_144
    assert count(PromptEmbedding(20, 768, device="meta")) == 20 * 768


@pytest.mark.parametrize("kind", ["embedding", "mlp", "lstm", "ptuning"])
def test_prompts(kind):
    """get_prompt(batch_size), and indices as the document's forward has them."""
    made = prompt(kind).eval()
    assert made(4).shape == (4, *made(1).shape[1:])
    indices = torch.arange(P).expand(2, -1)
    torch.testing.assert_close(made(indices), made(2))
    gpt, (ids, mask, labels) = model("gpt2"), batch("gpt2")
    want = with_prompt(gpt, made.encode().detach(), ids, mask, labels)
    insert_prompt(gpt, made)
    got = gpt(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss, want.loss)
    got.loss.backward()
    assert all(p.grad is not None for p in made.parameters())


def test_prefix_in_bert():
    """Keys and values before those of BertSelfAttention, in every layer; gone without a trace."""
    bert, (ids, mask, labels) = model("bert"), batch("bert")
    plain = bert(input_ids=ids, attention_mask=mask).logits
    states = prefix("bert", "projected")
    insert_prefix(bert, states)
    out = bert(input_ids=ids, attention_mask=mask, labels=labels)
    assert out.logits.shape == plain.shape and not torch.allclose(out.logits, plain)
    out.loss.backward()
    assert states.transform[2].weight.grad.view(LAYERS, 2, -1).abs().sum(-1).all()  # keys and values of each layer
    assert len(states.past_key_values(2)) == LAYERS
    assert torch.equal(remove_prompt(bert)(input_ids=ids, attention_mask=mask).logits, plain)


# The decisions


def test_decision_17_shapes():
    """The notes' A and B, both (r, d), do not multiply; A (r, in) and B (out, r) do, for any in and out."""
    layer = LoRALinear(nn.Linear(12, 20), rank=3, alpha=6, dropout_probability=0.0)
    assert layer.lora_A.shape == (3, 12) and layer.lora_B.shape == (20, 3)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(5, 12)
    want = x @ layer.weight.t() + layer.bias + 2.0 * x @ layer.lora_A.t() @ layer.lora_B.t()
    torch.testing.assert_close(layer(x), want)


def test_decision_18_scaling_is_constant():
    """The notes let alpha / r go to 1 as training goes on."""
    layer = LoRALayer(12, 20, rank=4, alpha=8)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    for _ in range(5):
        layer(torch.randn(3, 12)).square().sum().backward()
        optimizer.step()
    assert layer.scaling == 2.0
    assert LoRALayer(12, 20, rank=4, alpha=8, use_rslora=True).scaling == 4.0
    assert "fixed" in LoRALayer.__doc__ and "α/√r" in LoRALayer.__doc__


def test_decision_19_short_texts_are_repeated():
    """The notes pad with zeros what their code repeats, and call embeddings past_key_values."""
    words = nn.Embedding(40, 16)
    ids = torch.tensor(tokenizer("ab")["input_ids"])
    made = PromptEmbedding(5, 16, init="text", text="ab", tokenizer=tokenizer, word_embeddings=words)
    assert torch.equal(made.embedding.weight, words.weight[ids[[0, 1, 0, 1, 0]]])
    made = PromptEmbedding(2, 16, init="text", text="a b c d", tokenizer=tokenizer, word_embeddings=words)
    assert torch.equal(made.embedding.weight, words(torch.tensor(tokenizer("ab")["input_ids"])))
    gpt, (ids, _, _) = model("gpt2"), batch("gpt2")
    made = PromptEmbedding(P, 16, init="vocab", word_embeddings=gpt.get_input_embeddings())
    embeddings = torch.cat([made(2), gpt.get_input_embeddings()(ids)], 1)
    want = gpt(inputs_embeds=embeddings).logits
    torch.testing.assert_close(insert_prompt(gpt, made)(input_ids=ids).logits, want)


@pytest.mark.parametrize(
    "make",
    [lambda **options: PrefixEncoder(P, LAYERS, HEADS, HEAD, projection_dim=8, **options),
     lambda **options: PromptEncoder(P, 16, encoder="mlp", **options),
     lambda **options: PromptEncoder(P, 16, encoder="lstm", **options),
     lambda **options: PTuningEmbedding(P, 16, 8, **options)],
    ids=["prefix", "mlp", "lstm", "ptuning"],
)  # fmt: skip
def test_decision_20_inference_mode(make):
    """The notes' encoders have no ``transform`` or ``mlp_head`` in inference mode, and ask for it."""
    trained, loaded = make(), make(inference_mode=True)
    want = trained.eval()(2)
    assert list(trained.bake().state_dict()) == ["embedding.weight"]
    torch.testing.assert_close(trained(2), want)
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(loaded(2), trained(2))
