"""Five architectures at random weights: outputs and every gradient against PEFT's own."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from peft import LoraConfig, get_peft_model

from fastpeft.integrations import accelerate, restore
from peft_cases import compare, deep_budget, draw_seed, lora_layers, run

TOKENS = {"input_ids": torch.arange(14).view(2, 7) % 31}


def bert():
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config), TOKENS, ["query", "key", "value", "dense"], "SEQ_CLS"


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=31, n_embd=32, n_layer=2, n_head=4, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config), TOKENS, ["c_attn", "c_proj", "c_fc"], "CAUSAL_LM"


def llama():
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), TOKENS, "all-linear", "CAUSAL_LM"


def t5():
    # The GELU of T5 1.1: at these sizes one ReLU that a bf16 rounding flips is a third of a gradient.
    config = transformers.T5Config(
        vocab_size=31, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    inputs = {**TOKENS, "decoder_input_ids": TOKENS["input_ids"][:, :4]}
    return (
        transformers.T5ForConditionalGeneration(config),
        inputs,
        ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "SEQ_2_SEQ_LM",
    )


def vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=5,
    )  # fmt: skip
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    targets = r".*\.encoder\.layer\..*(query|key|value|dense)|.*(q_proj|k_proj|v_proj|o_proj|fc1|fc2)"
    return transformers.ViTForImageClassification(config), {"pixel_values": pixels}, targets, None


BUILD = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5, "vit": vit}


compare = partial(compare, within=deep_budget)


def logits(model, **inputs):
    return model(**inputs).logits


def build(name, dtype=torch.float32, **config):
    torch.manual_seed(0)
    model, inputs, targets, task = BUILD[name]()
    config = {"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False, **config}
    if name == "vit":
        config["modules_to_save"] = ["classifier"]
    model = get_peft_model(model.to(dtype), LoraConfig(task_type=task, **config))
    return model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BUILD)
def test_model(name, dtype, p):
    model, inputs = build(name, dtype, lora_dropout=p)
    report = accelerate(model)
    assert not report.skipped and len(report.accelerated) == len(lora_layers(model)) >= 8, str(report)
    restore(model)
    compare(model, inputs, call=logits, fast=len(report.accelerated))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name, reentrant):
    model, inputs = build(name, lora_dropout=0.2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    compare(model, inputs, call=logits, fast=2 * len(lora_layers(model)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation(name):
    model, inputs = build(name)
    model.eval()
    ours = copy.deepcopy(model)
    accelerate(ours)
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**inputs, **settings), model.generate(**inputs, **settings))


def test_tied_weights():
    # lm_head's A and B are the transposed B and A of the embedding's adapter: non-contiguous, and shared.
    config = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}
    model, inputs = build("llama", **config)
    lm_head = next(layer for layer in lora_layers(model) if layer.out_features == 31)
    assert not lm_head.lora_A["default"].weight.is_contiguous()
    compare(lambda: build("llama", **config)[0], inputs, call=logits, fast=3)


def test_replicated_layers():
    model, inputs = build("llama", target_modules=["q_proj", "down_proj"], layer_replication=[[0, 2], [1, 2]])
    model.config.use_cache = False
    compare(model, inputs, call=logits, fast=6)


def test_training_steps():
    # Ten steps of AdamW: the weights of both models stay together, and the loss falls.
    model, inputs = build("llama")
    ours = copy.deepcopy(model)
    accelerate(ours)
    losses = []
    for each in (model, ours):
        optimizer = torch.optim.AdamW([w for w in each.parameters() if w.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(10):
            loss = each(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1][-1] < losses[1][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-3)


def test_masks_are_recovered():
    # The comparison at p > 0 means something only if a wrong mask is noticed.
    model, inputs = build("bert", lora_dropout=0.2)
    ours = copy.deepcopy(model)
    accelerate(ours)
    first, again, other = (run(ours, inputs, logits, seed)["output"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(5)
    assert int(draw_seed("cpu")) != int(draw_seed("cpu"))
