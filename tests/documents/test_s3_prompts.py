"""S3, prompt tuning, prefix tuning, p-tuning v2 and LoRA in transformers models, and what is decided about them."""

import inspect

import pytest
import torch
from torch import nn

from fastpeft import (
    LoRALayer,
    LoRALinear,
    PatternVerbalizer,
    PrefixEncoder,
    PrefixTuning,
    PromptEmbedding,
    freeze_body,
    insert_prefix,
    insert_prompt,
)
from prompt_cases import (
    DECODERS,
    HEAD,
    HEADS,
    LAYERS,
    MODELS,
    D,
    P,
    batch,
    greedy,
    model,
    prefix,
    prompt,
    with_prefix,
    with_prompt,
)

# Usage


def test_prompt_tuning_in_pieces():
    """The document's forward: mask and embeddings grow, labels get -100, the loss is that of the real tokens."""
    gpt, (ids, mask, labels) = model("gpt2"), batch("gpt2")
    mask[0, -2:], labels[0, -2:] = 0, -100
    rows = PromptEmbedding(P, D)
    want = with_prompt(gpt, rows.embedding.weight.detach(), ids, mask, labels)
    insert_prompt(gpt, rows)
    out = gpt(input_ids=ids, attention_mask=mask, labels=labels)
    assert out.logits.shape[1] == P + ids.shape[1]
    torch.testing.assert_close(out.logits[:, :-2], want.logits[:, :-2])
    torch.testing.assert_close(out.loss, want.loss)
    assert [name for name, p in gpt.named_parameters() if p.requires_grad] == ["prompt.embedding.weight"]
    out.loss.backward()
    assert rows.embedding.weight.grad.any()


@pytest.mark.parametrize("name", MODELS)
def test_prefix_tuning(name):
    """Keys and values of every layer before the model's own, whatever the model, and in ``generate``."""
    made, states = model(name), prefix(name)
    ids, mask, labels = batch(name)
    want = with_prefix(made, [(k.detach(), v.detach()) for k, v in states.states(2)], ids, mask, labels)
    insert_prefix(made, states)
    got = made(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    if name in DECODERS:
        with torch.no_grad():
            new = made.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert torch.equal(new, greedy(lambda ids, mask: made(input_ids=ids, attention_mask=mask), ids, mask, 3))


def test_layout_of_the_encoder():
    """The document's 30 → 262144 = 32 · 2 · 4096 of Llama 7B, and its view, permute and split."""
    sizes = {"num_layers": 32, "num_kv_heads": 32, "head_dim": 128, "device": "meta"}
    assert PrefixEncoder(30, **sizes).embedding.weight.shape == (30, 262_144)
    made = PrefixEncoder(P, LAYERS, HEADS, HEAD)
    table = made(2).view(2, P, 2 * LAYERS, HEADS, HEAD).permute(2, 0, 3, 1, 4)
    for layer, pair in enumerate(table.split(2)):
        ours = made.states(2)[layer]
        assert torch.equal(pair[0], ours[0]) and torch.equal(pair[1], ours[1])


def test_p_tuning_v2_is_a_prefix_without_projection():
    made = PrefixEncoder(P, LAYERS, HEADS, HEAD)
    assert [name for name, _ in made.named_parameters()] == ["embedding.weight"]
    assert [name for name, _ in PrefixEncoder(P, LAYERS, HEADS, HEAD, projection_dim=6).named_parameters()] == [
        "embedding.weight", "transform.0.weight", "transform.0.bias", "transform.2.weight", "transform.2.bias"]  # fmt: skip


def test_lora_casts_itself_and_not_x():
    """result += lora_B(lora_A(dropout(x))) · scaling, with fp32 adapters on a half-precision layer."""
    layer = LoRALinear(nn.Linear(16, 12, dtype=torch.bfloat16), rank=4, alpha=8, dropout_probability=0.0)
    assert layer.lora_A.dtype == torch.float32
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    want = (x.double() @ (layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()).t()) + layer.bias
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).double(), want, rtol=0.05, atol=0.05)


def test_baselines():
    """The classical ways that the document begins with: a frozen body under a head, and a pattern to be filled in."""
    bert = model("bert", "SequenceClassification")
    assert freeze_body(bert) == ["classifier.weight", "classifier.bias"]
    words = {"bad": 5, "good": 6, "[MASK]": 4}

    class Words:
        mask_token, mask_token_id = "[MASK]", 4

        def __call__(self, text, **_):
            if isinstance(text, str):
                return {"input_ids": [words.get(word, 7) for word in text.split()]}
            rows = [self(each)["input_ids"] for each in text]
            return {"input_ids": torch.tensor(rows)}

    pet = PatternVerbalizer(Words(), "{text} It was {mask}", {"negative": "bad", "positive": "good"})
    inputs = pet.encode(["a film", "one more"])
    logits = model("bert", "MaskedLM")(**inputs).logits
    scores = pet.scores(logits, inputs)
    torch.testing.assert_close(scores, logits[:, -1, [5, 6]])
    assert pet.predict(logits, inputs) == [["negative", "positive"][i] for i in scores.argmax(-1).tolist()]


# The decisions


def test_decision_29_key_then_value():
    """The document's "2 is for q and v" is k and v; and its Linear prints the rank that it has."""
    for made in (PrefixTuning(LAYERS, HEADS, HEAD, P), PrefixEncoder(P, LAYERS, HEADS, HEAD)):
        key, value = made.get_prefix_states(1)
        table = made(1)[0].view(P, LAYERS, 2, HEADS, HEAD)
        assert torch.equal(key, table[:, 1, 0]) and torch.equal(value, table[:, 1, 1])
    assert "key before value" in inspect.getdoc(type(made).__mro__[1])
    assert "rank=8" in repr(LoRALayer(4, 4, rank=8))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decision_30_causal_with_a_prefix(name, attention):
    """``is_causal`` aligns to the top left: behind a prefix the first token would see one key of it, and no token itself."""
    made, states = model(name, attn_implementation=attention), prefix(name)
    made.set_attn_implementation(attention)
    ids, mask, _ = batch(name)
    plain = with_prefix(made, [(k.detach(), v.detach()) for k, v in states.states(2)], ids, mask)
    insert_prefix(made, states)
    with torch.no_grad():
        logits = made(input_ids=ids).logits
        torch.testing.assert_close(logits, plain.logits, rtol=1e-4, atol=1e-4)
        # A later token changes no earlier row, and a token changes its own.
        other = ids.clone()
        other[:, 3] = (other[:, 3] + 1) % 30 + 5
        changed = (made(input_ids=other).logits - logits).abs().amax((0, 2)) > 1e-4
    assert changed.tolist() == [False] * 3 + [True] * 3
    # Every virtual token reaches the first real one.
    made.zero_grad()
    made(input_ids=ids).logits[:, 0].sum().backward()
    grads = torch.stack([p.grad for p in states.parameters()])
    assert grads.abs().sum((0, 2)).all()


def test_decision_31_grouped_queries():
    """A prefix has the model's key/value heads, which are fewer than its query heads."""
    made, states = model("llama"), prefix("llama")
    assert states.num_kv_heads == 2 and made.config.num_attention_heads == HEADS
    assert states.get_prefix_states(0)[0].shape == (P, 2, HEAD)
    ids, _, _ = batch("llama")
    insert_prefix(made, states)(input_ids=ids).logits.sum().backward()
    with pytest.raises(ValueError, match="prefix must have num_kv_heads 2, the model's, got 4"):
        insert_prefix(model("llama"), PrefixTuning(LAYERS, HEADS, HEAD, P))


def test_wrong_width_is_said():
    with pytest.raises(ValueError, match="prompt must have token_dim 16"):
        insert_prompt(model("gpt2"), PromptEmbedding(P, D + 1))
    gpt = insert_prompt(model("gpt2"), prompt())
    with pytest.raises(ValueError, match="have no prompt or prefix yet"):
        insert_prefix(gpt, prefix("gpt2"))
