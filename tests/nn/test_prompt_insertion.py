"""insert_prompt: the formula, PEFT, masks, labels, positions, generation, and no trace of it afterwards."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from fastpeft.nn.prompts import PromptEmbedding, insert_prefix, insert_prompt, remove_prompt
from prompt_cases import (
    DECODERS,
    ENCODERS,
    HEADS,
    MODELS,
    P,
    batch,
    gradients,
    greedy,
    model,
    positions,
    prefix,
    prompt,
    trace,
    transformers,
    with_prompt,
)

ROUTES = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["embedding", "mlp", "lstm", "ptuning"])
def test_formula(name, kind):
    """Loss, logits and every gradient are those of the prompt's rows before the embeddings."""
    base, module = model(name), prompt(kind)
    ids, mask, labels = batch(name, left=2)
    inserted = insert_prompt(copy.deepcopy(base), module)
    given = {} if name == "t5" else {"position_ids": positions(name, mask)}
    out = inserted(input_ids=ids, attention_mask=mask, labels=labels, **given)
    ours = gradients(module, out.loss)
    gold = with_prompt(base, module.encode(), ids, mask, labels)
    torch.testing.assert_close(out.loss, gold.loss)
    # The rows of padding differ: nothing reads them.
    real = slice(None) if name == "t5" else slice(P + 2, None)
    torch.testing.assert_close(out.logits[:, real], gold.logits[:, real], rtol=1e-4, atol=1e-4)
    assert out.logits.shape[1] == ids.shape[1] + (0 if name == "t5" else P)
    torch.testing.assert_close(ours, gradients(module, gold.loss), rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for key, p in inserted.named_parameters() if not key.startswith("prompt."))


TASK_TYPES = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize("name", TASK_TYPES)
@pytest.mark.parametrize("kind", ["embedding", "mlp", "lstm"])
def test_peft(name, kind):
    """The same loss, gradients and generation from PEFT's weights; its generation without a cache, which it misreads."""
    peft = pytest.importorskip("peft")
    options = {"task_type": TASK_TYPES[name], "num_virtual_tokens": P, "num_transformer_submodules": 1}
    if kind == "embedding":
        config = peft.PromptTuningConfig(**options)
    else:
        config = peft.PromptEncoderConfig(
            **options, encoder_reparameterization_type=kind.upper(), encoder_hidden_size=8
        )
    base, module = model(name, "SequenceClassification" if name == "bert" else None), prompt(kind)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    encoder = theirs.prompt_encoder["default"]
    module.load_state_dict(encoder.state_dict())
    ours = insert_prompt(base, module)
    ids, mask, labels = batch(name)
    labels = labels[:, 0] if name == "bert" else labels
    one, two = (m(input_ids=ids, attention_mask=mask, labels=labels) for m in (theirs, ours))
    torch.testing.assert_close(two.loss, one.loss)
    torch.testing.assert_close(two.logits, one.logits)
    torch.testing.assert_close(gradients(module, two.loss), gradients(encoder, one.loss))
    if name != "bert":
        options = {
            "input_ids": ids,
            "attention_mask": mask,
            "max_new_tokens": 5,
            "do_sample": False,
            "use_cache": False,
        }
        assert torch.equal(ours.generate(**options), theirs.generate(**options))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("route", ROUTES)
def test_generate(name, route):
    """Every way through the cache writes what the whole formula does, over left padding too."""
    base, module = model(name), prompt()
    ids, mask, _ = batch(name, left=2)
    ours = insert_prompt(copy.deepcopy(base), module)
    gold = greedy(lambda ids, mask: with_prompt(base, module.encode(), ids, mask), ids, mask)
    options = dict(attention_mask=mask, max_new_tokens=5, do_sample=False, **ROUTES[route])
    assert torch.equal(ours.generate(ids, **options), gold)
    assert not torch.equal(base.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), gold)
    embeddings = base.get_input_embeddings()(ids)
    if route != "chunks":
        assert torch.equal(ours.generate(inputs_embeds=embeddings, **options), gold[:, ids.shape[1] :])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beams_and_samples(name):
    ours = insert_prompt(model(name), prompt())
    ids, mask, _ = batch(name, left=0 if name == "t5" else 2)
    beams = [
        ours.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=3, use_cache=c, do_sample=False)
        for c in (True, False)
    ]
    assert torch.equal(*beams)
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": True, "num_return_sequences": 2}
        samples.append(ours.generate(ids, use_cache=use_cache, **options))
    assert torch.equal(*samples)


def test_encoder_decoder_generation():
    base, module = model("t5"), prompt("mlp")
    ids, mask, _ = batch("t5", left=2)
    ours = insert_prompt(copy.deepcopy(base), module)
    embeddings = torch.cat([module(2), base.get_input_embeddings()(ids)], 1)
    longer = torch.cat([torch.ones(2, P, dtype=mask.dtype), mask], 1)
    for route in ("cache", "no cache", "static"):
        options = dict(max_new_tokens=5, do_sample=False, **ROUTES[route])
        gold = base.generate(inputs_embeds=embeddings, attention_mask=longer, **options)
        assert torch.equal(ours.generate(ids, attention_mask=mask, **options), gold), route
    assert not torch.equal(base.generate(ids, attention_mask=mask, **options), gold)
    outputs = ours.get_encoder()(ids, attention_mask=mask)
    assert outputs.last_hidden_state.shape[1] == ids.shape[1] + P
    again = ours(encoder_outputs=outputs, attention_mask=mask, labels=ids)
    torch.testing.assert_close(again.loss, ours(input_ids=ids, attention_mask=mask, labels=ids).loss)


@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_of_ones_own(name):
    """Token by token, with a mask or without, and a text that goes on in generate."""
    ours = insert_prompt(model(name), prompt())
    ids, _, _ = batch(name, T=9, B=1)
    whole = ours(ids).logits
    out = ours(ids[:, :6], use_cache=True)
    assert out.cache.get_seq_length() == P + 6
    for t in (6, 7, 8):
        given = {"attention_mask": torch.ones(1, t + 1)} if t != 7 else {"position_ids": torch.tensor([[t]])}
        out = ours(ids[:, t : t + 1], cache=out.cache, use_cache=True, **given)
        torch.testing.assert_close(out.logits[:, -1], whole[:, P + t], rtol=1e-4, atol=1e-4)
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = ours.generate(ids, max_new_tokens=2, **options)
    more = ours.generate(first.sequences, max_new_tokens=3, cache=first.cache, **options)
    assert torch.equal(more.sequences, ours.generate(ids, max_new_tokens=5, do_sample=False))
    with pytest.raises(ValueError, match=f"cache must have room for {P + 9} entries, .* got 10"):
        ours(ids, cache=transformers.StaticCache(config=ours.config, max_cache_len=10))


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_masks(name):
    """No mask, ones, and the same as 4-D, bool and added."""
    ours = insert_prompt(model(name), prompt())
    ids, mask, _ = batch(name)
    torch.testing.assert_close(ours(ids).logits, ours(ids, attention_mask=mask).logits)
    mask[0, 4:] = 0
    gold = ours(ids, attention_mask=mask).logits
    four = mask[:, None, None, :].bool().expand(2, 1, 6, 6)
    four = four.tril() if name in DECODERS else four
    added = torch.zeros(four.shape).masked_fill(~four, torch.finfo(torch.float32).min)
    for given in (four, added, *([four[:, :, :1]] if name in ENCODERS else [])):
        torch.testing.assert_close(ours(ids, attention_mask=given).logits[:, : P + 4], gold[:, : P + 4])
    with pytest.raises(
        ValueError, match=r"attention_mask must be None, \[batch, tokens\] or a 4-D tensor, got \[2, 6, 6\]"
    ):
        ours(ids, attention_mask=four[:, 0])


def test_labels_and_positions():
    """Labels are lengthened where there is one a token, and only there."""
    ids, _mask, labels = batch("bert", T=3, B=3)
    tokens = insert_prompt(model("bert"), prompt())
    one = tokens(ids, labels=labels)
    torch.testing.assert_close(one.loss, nn.functional.cross_entropy(one.logits[:, P:].flatten(0, 1), labels.flatten()))
    many = insert_prompt(model("bert", "SequenceClassification", num_labels=3), prompt())
    kinds = torch.randint(0, 2, (3, 3))
    torch.testing.assert_close(
        many(ids, labels=kinds.float()).loss,
        nn.functional.binary_cross_entropy_with_logits(many(ids).logits, kinds.float()),
    )
    spans = insert_prompt(model("bert", "QuestionAnswering", num_labels=2), prompt())
    start, end = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 2])
    out = spans(ids, start_positions=start, end_positions=end)
    gold = [
        nn.functional.cross_entropy(logits[:, :], where + P)
        for logits, where in ((out.start_logits, start), (out.end_logits, end))
    ]
    torch.testing.assert_close(out.loss, sum(gold) / 2)
    types = torch.ones_like(ids)
    assert not torch.equal(tokens(ids, token_type_ids=types).logits, tokens(ids).logits)
    shifted = tokens(ids, position_ids=torch.arange(3)[None])
    torch.testing.assert_close(shifted.logits, tokens(ids).logits)
    roberta = insert_prompt(model("roberta"), prompt())
    torch.testing.assert_close(roberta(ids, position_ids=torch.arange(2, 5)[None]).logits, roberta(ids).logits)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_classifying_decoder_reads_the_last_token(name):
    """A head that looks for padding among the ids finds it where it is, on either side."""
    base, module = model(name, "SequenceClassification", num_labels=3), prompt()
    ids, mask, _ = batch(name)
    ours = insert_prompt(base, module)
    ids[0, 4:], mask[0, 4:] = 0, 0
    padded = ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[0], ours(ids[:1, :4]).logits[0])
    torch.testing.assert_close(padded[1], ours(ids[1:]).logits[0])


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(name, reentrant):
    ours, (ids, mask, labels) = insert_prompt(model(name), prompt("mlp")).train(), batch(name)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        grads.append(gradients(ours.prompt, ours(input_ids=ids, attention_mask=mask, labels=labels).loss))
    torch.testing.assert_close(*grads)


def test_encoder_runs_once_a_step():
    ours, (ids, mask, labels) = insert_prompt(model("llama"), prompt("lstm")), batch("llama", B=4)
    calls = []
    ours.prompt.lstm_head.register_forward_hook(lambda module, args, out: calls.append(args[0].shape))
    ours(ids, attention_mask=mask, labels=labels).loss.backward()
    assert calls == [(1, P, 16)]
    ours.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert len(calls) == 2


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()  # T5's last digits depend on whether a gradient is asked for
def test_removal_leaves_no_trace(name):
    ours = model(name)
    ours.get_input_embeddings().weight.requires_grad_(False)
    ids, _mask, _ = batch(name)
    given = {"decoder_input_ids": ids} if name == "t5" else {}
    before, logits = trace(ours), ours(input_ids=ids, **given).logits
    before[2][""] = sorted(ours.__dict__)
    signature = inspect.signature(ours.forward)
    assert insert_prompt(ours, prompt()) is ours
    assert {key for key, p in ours.named_parameters() if p.requires_grad} == {"prompt.embedding.weight"}
    assert inspect.signature(ours.forward) == signature and type(ours).__name__ in repr(type(ours))
    assert not torch.equal(ours(input_ids=ids, **given).logits[:, -1], logits[:, -1])
    ours.prompt.disable()
    assert torch.equal(ours(input_ids=ids, **given).logits, logits)
    assert remove_prompt(ours) is ours
    assert trace(ours) == before and torch.equal(ours(input_ids=ids, **given).logits, logits)
    insert_prompt(ours, prompt(), freeze_base=False)
    assert all(p.requires_grad == before[1].get(key, True) for key, p in ours.named_parameters())
    remove_prompt(ours)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_copies_and_pickles(name):
    ours, (ids, mask, labels) = insert_prompt(model(name), prompt("mlp")), batch(name)
    loss = ours(input_ids=ids, attention_mask=mask, labels=labels).loss
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours) and twin.prompt is not ours.prompt
        assert torch.equal(twin(input_ids=ids, attention_mask=mask, labels=labels).loss, loss)
        with torch.no_grad():
            twin.prompt.embedding.weight.zero_()
        assert not torch.equal(twin(input_ids=ids, attention_mask=mask, labels=labels).loss, loss)
        remove_prompt(twin)
    assert torch.equal(ours(input_ids=ids, attention_mask=mask, labels=labels).loss, loss)
    ours.prompt.bake()
    torch.testing.assert_close(ours(input_ids=ids, attention_mask=mask, labels=labels).loss, loss)
    state = copy.deepcopy(ours.state_dict())
    other = insert_prompt(model(name), prompt("mlp"))
    other.load_state_dict(state)
    torch.testing.assert_close(other(input_ids=ids, attention_mask=mask, labels=labels).loss, loss)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_dtypes(name):
    """A half-precision base beside an fp32 prompt, and autocast: near the fp32 loss, gradients in fp32."""
    ours, (ids, mask, labels) = insert_prompt(model(name), prompt("mlp")), batch(name)
    gold = ours(input_ids=ids, attention_mask=mask, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss.float(), gold, rtol=0.05, atol=0.05)
    assert all(grad.dtype == torch.float32 for grad in gradients(ours.prompt, loss).values())
    half = insert_prompt(remove_prompt(copy.deepcopy(ours)).bfloat16(), copy.deepcopy(ours.prompt))
    loss = half(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss.float(), gold, rtol=0.05, atol=0.05)
    assert all(grad.dtype == torch.float32 for grad in gradients(half.prompt, loss).values())


def test_mode_is_the_models():
    """A new prompt drops nothing in a model that is in eval mode, as a loaded one is."""
    ours, (ids, _, _) = insert_prompt(model("llama"), prompt(dropout=0.5)), batch("llama")
    assert not ours.prompt.training and torch.equal(ours(ids).logits, ours(ids).logits)
    remove_prompt(ours)
    insert_prefix(ours, prefix("llama", dropout=0.5))
    assert not ours.prefix.training and torch.equal(ours(ids).logits, ours(ids).logits)
    ours.train()
    assert ours.prefix.training and not torch.equal(ours(ids).logits, ours(ids).logits)


def test_training_moves_the_prompt_alone():
    ours, (ids, mask, labels) = insert_prompt(model("gpt2"), prompt(dropout=0.1)).train(), batch("gpt2")
    before = copy.deepcopy(ours.state_dict())
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = ours(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert {key for key, value in ours.state_dict().items() if not torch.equal(value, before[key])} == {
        "prompt.embedding.weight"
    }


@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta"])
def test_as_many_tokens_as_positions(name):
    """A table of 48 positions, of which RoBERTa leaves two out, takes P tokens less."""
    ours, most = insert_prompt(model(name), prompt()), 48 - P - 2 * (name == "roberta")
    ours(batch(name, T=most)[0])
    with pytest.raises(ValueError, match=f"input_ids must have at most {most} tokens .* got {most + 1}"):
        ours(batch(name, T=most + 1)[0])


def test_compile():
    ours, (ids, mask, labels) = insert_prompt(model("llama"), prompt("mlp")), batch("llama")
    loss = ours(input_ids=ids, attention_mask=mask, labels=labels).loss
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=False)
    again = compiled(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(gradients(ours.prompt, again), gradients(ours.prompt, loss))


def replaced():
    ours = insert_prompt(model("llama"), prompt())
    ours.set_input_embeddings(nn.Embedding(40, 16))
    return ours(torch.ones(1, 2, dtype=torch.int64))


def hooked():
    ours = model("llama")
    ours.forward = ours.forward
    return insert_prompt(ours, prompt())


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: insert_prompt(model("gpt2"), PromptEmbedding(3, 8)), ValueError, "prompt must have token_dim 16, the model's, got 8"),
        (lambda: insert_prompt(model("gpt2"), prefix("gpt2")), TypeError, "prompt must be a prompt, got PrefixTuning"),
        (lambda: insert_prompt(transformers.ViTModel(transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)), prompt()), ValueError, "model must read input_ids, got pixel_values"),
        (lambda: insert_prompt(nn.Linear(4, 4), prompt()), TypeError, "model must be a transformers model .* got Linear"),
        (lambda: insert_prompt(model("gpt2"), prompt(), freeze_base=1), TypeError, "freeze_base must be True or False"),
        (lambda: insert_prompt(insert_prompt(model("t5"), prompt()), prompt()), ValueError, "have no prompt or prefix yet"),
        (lambda: insert_prefix(insert_prompt(model("bert"), prompt()), prefix("bert")), ValueError, r"have no prompt or prefix yet; remove_prompt first, got \['PromptEmbedding'\]"),
        (lambda: remove_prompt(model("bert")), ValueError, "model must have a prompt or prefix of its own, got none"),
        (lambda: remove_prompt(3), TypeError, "model must be an nn.Module, got int"),
        (replaced, ValueError, "model must keep the embedding that it had"),
        (hooked, ValueError, "model must run its class's forward"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_refusal_changes_nothing():
    ours = model("gpt2")
    before = trace(ours)
    with pytest.raises(ValueError, match="token_dim"):
        insert_prompt(ours, PromptEmbedding(3, 8))
    with pytest.raises(ValueError, match="num_kv_heads"):
        insert_prefix(ours, prefix("llama"))
    assert trace(ours) == before and HEADS == 4
