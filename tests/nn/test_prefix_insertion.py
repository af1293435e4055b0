"""insert_prefix: attention written out, PEFT where it is right, masks, caches, generation, recomputation, no trace."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from fastpeft.nn.prompts import PrefixTuning, insert_prefix, insert_prompt, remove_prompt
from prompt_cases import (
    DECODERS,
    ENCODERS,
    HEAD,
    HEADS,
    LAYERS,
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
    with_prefix,
)

ROUTES = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["tuning", "table", "projected"])
def test_formula(name, kind):
    """Decisions 30, 31: loss, logits and every gradient are those of attention with the prefix written out.

    Every layer has its own keys, as many as the model's key/value heads; positions begin at P; encoders take one too.
    """
    base, module = model(name), prefix(name, kind)
    ids, mask, labels = batch(name, left=0 if name == "t5" else 2)
    ours = insert_prefix(copy.deepcopy(base), module)
    given = {} if name == "t5" else {"attention_mask": mask, "position_ids": positions(name, mask)}
    out = ours(input_ids=ids, labels=labels, **given)
    grads = gradients(module, out.loss)
    gold = with_prefix(base, module.states(2), ids, mask, labels)
    torch.testing.assert_close(out.loss, gold.loss)
    torch.testing.assert_close(out.logits[:, 2:], gold.logits[:, 2:], rtol=1e-4, atol=1e-4)
    assert out.logits.shape == gold.logits.shape
    torch.testing.assert_close(grads, gradients(module, gold.loss), rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for key, p in ours.named_parameters() if not key.startswith("prefix."))


@pytest.mark.parametrize("name", MODELS)
def test_implicit_positions(name):
    """Without position_ids real tokens stand where explicit ones put them: from P."""
    ours, (ids, _, labels) = insert_prefix(model(name), prefix(name)), batch(name)
    mask = torch.ones_like(ids)
    given = {} if name == "t5" else {"position_ids": positions(name, mask)}
    torch.testing.assert_close(
        ours(input_ids=ids, labels=labels).logits, ours(input_ids=ids, labels=labels, **given).logits
    )
    if name != "t5":
        embeddings = ours.get_input_embeddings()(ids)
        torch.testing.assert_close(ours(inputs_embeds=embeddings).logits, ours(input_ids=ids).logits)


@pytest.mark.parametrize("name, task", [("gpt2", "CAUSAL_LM"), ("llama", "CAUSAL_LM"), ("bert", "FEATURE_EXTRACTION")])
@pytest.mark.parametrize("kind", ["table", "projected"])
def test_peft(name, task, kind):
    """The same loss and gradients from PEFT's weights, where PEFT can: not for BERT's heads, T5, nor in generate."""
    peft = pytest.importorskip("peft")
    options = {"prefix_projection": kind == "projected", "encoder_hidden_size": 8}
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P, **options)
    base, module = model(name, "Model" if name == "bert" else None), prefix(name, kind)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    encoder = theirs.prompt_encoder["default"]
    module.load_state_dict(encoder.state_dict())
    ours = insert_prefix(base, module)
    ids, mask, labels = batch(name)
    if name == "bert":
        one, two = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (theirs, ours))
        losses = one.square().sum(), two.square().sum()
    else:
        outs = [m(input_ids=ids, attention_mask=mask, labels=labels) for m in (theirs, ours)]
        (one, two), losses = [out.logits for out in outs], [out.loss for out in outs]
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    expected = gradients(encoder, losses[0])
    torch.testing.assert_close(gradients(module, losses[1]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("route", ROUTES)
def test_generate(name, route):
    """Every way through the cache writes what the formula does, over left padding too; PEFT drops the prefix here."""
    base, module = model(name), prefix(name)
    ids, mask, _ = batch(name, left=2)
    ours = insert_prefix(copy.deepcopy(base), module)
    gold = greedy(lambda ids, mask: with_prefix(base, module.states(2), ids, mask), ids, mask)
    options = dict(attention_mask=mask, max_new_tokens=5, do_sample=False, **ROUTES[route])
    assert torch.equal(ours.generate(ids, **options), gold)
    assert not torch.equal(base.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), gold)
    if route != "chunks":
        embeddings = base.get_input_embeddings()(ids)
        assert torch.equal(ours.generate(inputs_embeds=embeddings, **options), gold[:, ids.shape[1] :])


def test_encoder_decoder_generation():
    """The prefix is in the decoder's self-attention: with a cache, a static one, without, and over beams."""
    base, module = model("t5"), prefix("t5")
    ids, mask, _ = batch("t5", left=2)
    ours = insert_prefix(copy.deepcopy(base), module)
    start = torch.zeros(2, 1, dtype=torch.int64)

    def step(tokens, _):
        return ours(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens)

    gold = greedy(step, start, start)
    for route in ("cache", "no cache", "static"):
        options = dict(attention_mask=mask, max_new_tokens=5, do_sample=False, **ROUTES[route])
        assert torch.equal(ours.generate(ids, **options), gold), route
    assert not torch.equal(base.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), gold)
    longer = torch.ones(2, 4, dtype=torch.int64)
    with_mask = ours(input_ids=ids, decoder_input_ids=gold[:, :4], decoder_attention_mask=longer).logits
    torch.testing.assert_close(with_mask, ours(input_ids=ids, decoder_input_ids=gold[:, :4]).logits)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beams(name):
    ours = insert_prefix(model(name), prefix(name))
    ids, mask, _ = batch(name, left=0 if name == "t5" else 2)
    options = {"attention_mask": mask, "max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), ours.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_of_ones_own(name):
    """Token by token, with a mask or without, under either name, and a text that goes on in generate."""
    ours = insert_prefix(model(name), prefix(name))
    ids, _, _ = batch(name, T=9, B=1)
    whole = ours(ids).logits
    empty = transformers.DynamicCache(config=ours.config)
    out = ours(ids[:, :6], past_key_values=empty, use_cache=True)
    assert out.cache is empty and empty.get_seq_length() == P + 6
    for t in (6, 7, 8):
        given = {"attention_mask": torch.ones(1, t + 1)} if t != 7 else {"position_ids": torch.tensor([[t]])}
        out = ours(ids[:, t : t + 1], cache=out.cache, use_cache=True, **given)
        torch.testing.assert_close(out.logits[:, -1], whole[:, t], rtol=1e-4, atol=1e-4)
    static = transformers.StaticCache(config=ours.config, max_cache_len=P + 9)
    torch.testing.assert_close(ours(ids, cache=static).logits, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=f"cache must have room for {P + 9} entries, .* got 10"):
        ours(ids, cache=transformers.StaticCache(config=ours.config, max_cache_len=10))
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = ours.generate(ids, max_new_tokens=2, **options)
    # Without a mask generate takes a token that it has drawn for padding, where it is the padding token.
    seen = torch.ones_like(first.sequences)
    more = ours.generate(first.sequences, max_new_tokens=3, cache=first.cache, attention_mask=seen, **options)
    assert torch.equal(more.sequences, ours.generate(ids, max_new_tokens=5, do_sample=False))


def test_sliding_window():
    """A layer with a window sees the prefix as far as the window reaches, in one call as in several."""
    ours = insert_prefix(model("mistral", sliding_window=5), prefix("mistral"))
    ids, _, _ = batch("mistral", T=9, B=1)
    whole = ours(ids).logits
    out, rows = ours(ids[:, :4], use_cache=True), []
    for t in range(4, 9):
        out = ours(ids[:, t : t + 1], cache=out.cache, use_cache=True)
        rows.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(rows, 1), whole[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_masks(name):
    """No mask, ones, and the same as 4-D, bool and added."""
    ours = insert_prefix(model(name), prefix(name))
    ids, mask, _ = batch(name)
    torch.testing.assert_close(ours(ids).logits, ours(ids, attention_mask=mask).logits)
    mask[0, 4:] = 0
    gold = ours(ids, attention_mask=mask).logits
    four = mask[:, None, None, :].bool().expand(2, 1, 6, 6)
    four = four.tril() if name in DECODERS else four
    added = torch.zeros(four.shape).masked_fill(~four, torch.finfo(torch.float32).min)
    for given in (four, added):
        torch.testing.assert_close(ours(ids, attention_mask=given).logits[:, :4], gold[:, :4])
    with pytest.raises(ValueError, match="attention_mask must be None"):
        ours(ids, attention_mask=four[:, 0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_checkpointing(name, attention):
    """The same loss and gradients where transformers drops the cache, with dropout and two steps in flight."""
    ours = insert_prefix(model(name, _attn_implementation=attention), prefix(name, "projected", dropout=0.3)).train()
    first, second = batch(name), batch(name)

    def loss():
        torch.manual_seed(2)
        outs = [ours(input_ids=ids, attention_mask=mask, labels=labels) for ids, mask, labels in (first, second)]
        return outs[0].loss + outs[1].loss

    gold = loss()
    expected = gradients(ours.prefix, gold)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    before = {id(m): m.__dict__.get("_gradient_checkpointing_func") for m in ours.modules()}
    hooks = {id(m): len(m._forward_pre_hooks) for m in ours.modules()}
    again = loss()
    torch.testing.assert_close(again, gold)
    torch.testing.assert_close(gradients(ours.prefix, again), expected, rtol=1e-4, atol=1e-6)
    assert before == {id(m): m.__dict__.get("_gradient_checkpointing_func") for m in ours.modules()}
    assert hooks == {id(m): len(m._forward_pre_hooks) for m in ours.modules()}
    ours.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"checkpointing must be gradient checkpointing with use_reentrant=False"):
        loss()


def test_one_run_a_step():
    ours, (ids, mask, labels) = insert_prefix(model("llama"), prefix("llama", "projected")), batch("llama", B=4)
    calls = []
    ours.prefix.transform.register_forward_hook(lambda module, args, out: calls.append(tuple(args[0].shape)))
    ours(ids, attention_mask=mask, labels=labels).loss.backward()
    assert calls == [(P, 2 * HEAD)]
    ours.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert len(calls) == 2


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()  # T5's last digits depend on whether a gradient is asked for
def test_removal_leaves_no_trace(name):
    ours = model(name)
    ours.get_input_embeddings().weight.requires_grad_(False)
    ids, _, _ = batch(name)
    given = {"decoder_input_ids": ids} if name == "t5" else {}
    logits = ours(input_ids=ids, **given).logits
    before, signature = trace(ours), inspect.signature(ours.forward)
    assert insert_prefix(ours, prefix(name)) is ours
    assert {key.split(".")[0] for key, p in ours.named_parameters() if p.requires_grad} == {"prefix"}
    assert inspect.signature(ours.forward) == signature
    assert not torch.equal(ours(input_ids=ids, **given).logits, logits)
    ours.prefix.disable()
    assert torch.equal(ours(input_ids=ids, **given).logits, logits)
    assert remove_prompt(ours) is ours
    assert trace(ours) == before and torch.equal(ours(input_ids=ids, **given).logits, logits)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_copies_and_pickles(name):
    ours, (ids, mask, labels) = insert_prefix(model(name), prefix(name, "projected")), batch(name)
    loss = ours(input_ids=ids, attention_mask=mask, labels=labels).loss
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours) and twin.prefix is not ours.prefix
        assert torch.equal(twin(input_ids=ids, attention_mask=mask, labels=labels).loss, loss)
        with torch.no_grad():
            twin.prefix.embedding.weight.zero_()
        assert not torch.equal(twin(input_ids=ids, attention_mask=mask, labels=labels).loss, loss)
        remove_prompt(twin)
    ours.prefix.bake()
    torch.testing.assert_close(ours(input_ids=ids, attention_mask=mask, labels=labels).loss, loss)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_dtypes(name):
    """A half-precision base beside an fp32 prefix, and autocast: near the fp32 loss, gradients in fp32."""
    ours, (ids, mask, labels) = insert_prefix(model(name), prefix(name, "projected")), batch(name)
    gold = ours(input_ids=ids, attention_mask=mask, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss.float(), gold, rtol=0.05, atol=0.05)
    assert all(grad.dtype == torch.float32 for grad in gradients(ours.prefix, loss).values())
    half = insert_prefix(remove_prompt(copy.deepcopy(ours)).bfloat16(), copy.deepcopy(ours.prefix))
    loss = half(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss.float(), gold, rtol=0.05, atol=0.05)
    assert all(grad.dtype == torch.float32 for grad in gradients(half.prefix, loss).values())


def test_starting_from_real_tokens():
    """A prefix copied from the cache of P tokens acts as these tokens before the others."""
    base = model("llama")
    ids, _, _ = batch("llama", T=P + 6, B=1)
    module = prefix("llama")
    module.copy_past_key_values(base(ids[:, :P], use_cache=True).cache)
    ours = insert_prefix(copy.deepcopy(base), module)
    torch.testing.assert_close(ours(ids[:, P:]).logits, base(ids).logits[:, P:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("inserted", [False, True])
def test_copied_from_tokens(name, inserted):
    """What the model caches for P tokens, before or after the insertion; the prefix takes no part in it."""
    base, module = model(name).train(), prefix(name)
    ids = batch(name, T=P, B=1)[0]
    reads = base.get_decoder() if name == "t5" else base.base_model
    cache = transformers.DynamicCache()
    with torch.no_grad():
        reads.eval()(
            ids, **{"cache" if "cache" in inspect.signature(reads.forward).parameters else "past_key_values": cache}
        )
    base.train()
    if inserted:
        insert_prefix(base, module)
    module.copy_from_tokens(base, ids[0])
    for layer, pair in zip(cache.layers, module.states(), strict=True):
        assert torch.equal(layer.keys, pair[0]) and torch.equal(layer.values, pair[1])
    assert base.training and module.enabled
    with pytest.raises(ValueError, match=f"input_ids must have {P} tokens"):
        module.copy_from_tokens(base, ids[:, 1:])
    with pytest.raises(ValueError, match="prefix must be parameters alone"):
        prefix(name, "projected").copy_from_tokens(base, ids)


@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta"])
def test_as_many_tokens_as_positions(name):
    """A table of 48 positions, of which RoBERTa leaves two out, takes P tokens less."""
    ours, most = insert_prefix(model(name), prefix(name)), 48 - P - 2 * (name == "roberta")
    ours(batch(name, T=most)[0])
    with pytest.raises(ValueError, match=f"input_ids must have at most {most} tokens .* got {most + 1}"):
        ours(batch(name, T=most + 1)[0])


def test_compile():
    ours, (ids, mask, labels) = insert_prefix(model("llama"), prefix("llama", "projected")), batch("llama")
    loss = ours(input_ids=ids, attention_mask=mask, labels=labels).loss
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=False)
    again = compiled(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(gradients(ours.prefix, again), gradients(ours.prefix, loss), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_compiled_decoding(kind):
    """A step over a static cache is one graph, compiled once: nothing in it reads how long the cache is."""
    options = transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    if not hasattr(options, "_compile_all_devices"):
        pytest.skip("this transformers compiles on GPUs alone")
    options._compile_all_devices = True
    ours = (
        insert_prefix(model("llama"), prefix("llama")) if kind == "prefix" else insert_prompt(model("llama"), prompt())
    )
    ids, mask, _ = batch("llama", left=2)
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    gold = ours.generate(ids, **given)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(ours.generate(ids, cache_implementation="static", compile_config=options, **given), gold)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def distilbert():
    config = transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=4, hidden_dim=24)
    return transformers.DistilBertModel(config)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: insert_prefix(model("llama"), PrefixTuning(LAYERS, HEADS, HEAD, P)), ValueError, "prefix must have num_kv_heads 2, the model's, got 4"),
        (lambda: insert_prefix(model("gpt2"), PrefixTuning(LAYERS, HEADS, 8, P)), ValueError, "prefix must have head_dim 4, the model's, got 8"),
        (lambda: insert_prefix(model("t5"), PrefixTuning(3, HEADS, HEAD, P)), ValueError, "prefix must have num_layers 2, the model's, got 3"),
        (lambda: insert_prefix(model("gpt2"), prompt()), TypeError, "prefix must be a prefix, got PromptEmbedding"),
        (lambda: insert_prefix(nn.Linear(4, 4), prefix("gpt2")), TypeError, "model must be a transformers model .* got Linear"),
        (lambda: insert_prefix(insert_prefix(model("bert"), prefix("bert")), prefix("bert")), ValueError, "have no prompt or prefix yet"),
        (lambda: insert_prefix(distilbert(), prefix("bert")), ValueError, "model must take cached keys and values in its forward, got DistilBertModel"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
