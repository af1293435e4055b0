"""The encoders of prompts and prefixes: shapes, one run a step, PEFT's states, baking, first values, graphs, errors."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastpeft.nn.prompts import (
    PrefixEncoder,
    PrefixTuning,
    PromptEmbedding,
    PromptEncoder,
    PTuningEmbedding,
    prepend_prompt,
)

MAKERS = {
    "embedding": lambda **k: PromptEmbedding(5, 12, **k),
    "mlp": lambda **k: PromptEncoder(5, 12, hidden_size=7, **k),
    "lstm": lambda **k: PromptEncoder(5, 12, encoder="lstm", hidden_size=7, **k),
    "ptuning": lambda **k: PTuningEmbedding(5, 12, 7, **k),
    "tuning": lambda **k: PrefixTuning(2, 3, 4, 5, **k),
    "table": lambda **k: PrefixEncoder(5, 2, 3, 4, **k),
    "projected": lambda **k: PrefixEncoder(5, 2, 3, 4, 7, **k),
}
PREFIXES = ("tuning", "table", "projected")
ALL = pytest.mark.parametrize("kind", MAKERS)


def runs(module):
    """The inputs of every LSTM, linear layer and normalisation below ``module``, as they are called."""
    seen = []
    for child in module.modules():
        if isinstance(child, (nn.LSTM, nn.Linear, nn.LayerNorm)):
            child.register_forward_pre_hook(lambda module, args: seen.append((type(module).__name__, args[0].shape)))
    return seen


@ALL
def test_shapes(kind):
    module = MAKERS[kind]()
    width = 2 * 2 * 3 * 4 if kind in PREFIXES else 12
    assert module(4).shape == (4, 5, width) and module().shape == (1, 5, width) and module(0).shape == (0, 5, width)
    indices = torch.arange(5).expand(4, -1)
    torch.testing.assert_close(module(indices), module(4))
    torch.testing.assert_close(module(torch.tensor([3, 1], dtype=torch.int32)), module(1)[0, [3, 1]])
    assert module(2, torch.bfloat16).dtype == torch.bfloat16


def test_the_documents_calls():
    module = PTuningEmbedding(
        num_virtual_tokens=20, embedding_dimension=768, hidden_dimension=512, dropout_probability=0.1
    )
    assert module(2).shape == (2, 20, 768) and module.virtual_embeddings.shape == (20, 768)
    module.eval()
    rows = module.mlp[2](torch.relu(module.mlp[0](module.virtual_embeddings)))
    torch.testing.assert_close(module(3)[1], nn.functional.layer_norm(rows, (768,)))
    prefix = PrefixTuning(
        num_layers=12, num_heads=12, head_dimension=64, prefix_length=20, dropout_probability=0.1
    ).eval()
    key, value = prefix.get_prefix_states(11)
    assert key.shape == value.shape == (20, 12, 64)
    halves = prefix.prefix_embeddings[11].chunk(2, dim=1)
    assert torch.equal(key.flatten(1), halves[0]) and torch.equal(value.flatten(1), halves[1])
    sizes = {sum(p.numel() for p in PrefixEncoder(20, 12, 12, 64, h).parameters()) for h in (None, 768)}
    assert sizes == {368_640, 14_780_160}


@pytest.mark.parametrize(
    "first, second",
    [
        (PromptEmbedding(3, 8, dropout=0.5), PromptEmbedding(prefix_length=3, embedding_dim=8, dropout_probability=0.5)),
        (PromptEncoder(3, 8, "lstm", 4, 1), PromptEncoder(3, embedding_dimension=8, encoder="LSTM", encoder_hidden_size=4, encoder_num_layers=1)),
        (PTuningEmbedding(3, 8, 4, 0.5), PTuningEmbedding(num_virtual_tokens=3, token_dim=8, hidden_size=4, dropout=0.5)),
        (PrefixTuning(2, 3, 4, 5), PrefixTuning(num_layers=2, num_kv_heads=3, head_dim=4, num_virtual_tokens=5)),
        (PrefixEncoder(5, 2, 3, 4, 7), PrefixEncoder(prefix_length=5, num_layers=2, num_heads=3, head_dimension=4, encoder_hidden_size=7)),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_spellings(first, second):
    assert repr(first) == repr(second)
    second.load_state_dict(first.state_dict())


@ALL
def test_runs_once_and_never_on_equal_rows(kind):
    """Decision 7: one run a call, on the P rows, whatever the batch; nothing is copied for it."""
    module = MAKERS[kind]()
    seen = runs(module)
    out = module(64)
    assert all(shape.numel() <= 5 * 14 for _, shape in seen) and out.stride(0) == 0
    once = len(seen)
    assert once == {"mlp": 3, "lstm": 3, "ptuning": 3, "projected": 2}.get(kind, 0)
    if kind == "lstm":
        assert [name for name, _ in seen].count("LSTM") == 1
    out.sum().backward()
    assert len(seen) == once and all(p.grad is not None for p in module.parameters())


@ALL
def test_gradient_is_the_sum_over_the_batch(kind):
    module = MAKERS[kind]().double()
    weight = torch.randn(6, 5, module.width, dtype=torch.float64)
    (module(6) * weight).sum().backward()
    ours = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    (torch.stack([module.encode() for _ in range(6)]) * weight).sum().backward()
    torch.testing.assert_close(ours, [p.grad for p in module.parameters()])


@ALL
def test_dropout_after_the_expansion(kind):
    """Every sample has a mask of its own, kept values are scaled, and the encoder still runs once."""
    module = MAKERS[kind](dropout=0.25)
    seen = runs(module)
    out = module(200)
    assert all(shape.numel() <= 5 * 14 for _, shape in seen)
    table = module.encode()
    zero = out == 0
    assert not torch.equal(zero[0], zero[1]) and 0.22 < zero.float().mean() < 0.28
    torch.testing.assert_close(out[~zero], (table / 0.75).expand_as(out)[~zero])
    module.eval()
    torch.testing.assert_close(module(3), table.expand(3, -1, -1))
    module.train().dropout_probability = 0.0
    torch.testing.assert_close(module(3), table.expand(3, -1, -1))


@pytest.mark.parametrize("kind", PREFIXES)
def test_prefix_states(kind):
    """Layer, then key before value, then head: each way to ask gives the same numbers."""
    module = MAKERS[kind]()
    table = module.encode().view(5, 2, 2, 3, 4)
    for layer, (key, value) in enumerate(module.states(6)):
        assert key.shape == value.shape == (6, 3, 5, 4) and key.stride(0) == 0
        for which, states in enumerate((key, value)):
            torch.testing.assert_close(states[2], table[:, layer, which].transpose(0, 1))
            torch.testing.assert_close(module.get_prefix_states(layer)[which], table[:, layer, which])
    with pytest.raises(ValueError, match=r"layer must be in \[0, 2\), got 2"):
        module.get_prefix_states(2)


@pytest.mark.parametrize("kind", PREFIXES)
def test_past_key_values(kind):
    pytest.importorskip("transformers")
    module = MAKERS[kind]()
    cache = module.past_key_values(6)
    assert cache.get_seq_length() == 5 and len(cache.layers) == 2
    for layer, (key, value) in zip(cache.layers, module.states(6), strict=True):
        assert torch.equal(layer.keys, key) and torch.equal(layer.values, value)
    one = [(torch.randn(1, 3, 5, 4), torch.randn(1, 3, 5, 4)) for _ in range(2)]
    if kind == "projected":
        with pytest.raises(ValueError, match="prefix must be parameters alone"):
            module.copy_past_key_values(one)
        module.bake()
    module.copy_past_key_values(one)
    assert all(
        torch.equal(a, b)
        for pair, states in zip(one, module.states(), strict=True)
        for a, b in zip(pair, states, strict=True)
    )
    with pytest.raises(ValueError, match=r"cache must hold states of shape .* \[1, 3, 5, 4\], got \[1, 3, 2, 4\]"):
        module.copy_past_key_values([(k[:, :, :2], v) for k, v in one])


@ALL
def test_bake(kind):
    """The output in the place of the encoder, under PEFT's names; it loads wherever a table can stand."""
    module = MAKERS[kind]()
    before, shape = module(2), (5, module.width)
    trained = copy.deepcopy(module.state_dict())
    assert module.bake() is module and module.bake().baked
    torch.testing.assert_close(module(2), before)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {"embedding.weight": shape}
    assert [p.requires_grad for p in module.parameters()] == [True]
    fresh = MAKERS[kind]()
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(fresh(2), before)
    from_peft = MAKERS[kind]()
    from_peft.load_state_dict({"prompt_embeddings": before[0].detach()})
    torch.testing.assert_close(from_peft(2), before)
    if kind not in PREFIXES:
        plain = PromptEmbedding(5, 12)
        plain.load_state_dict(module.state_dict())
        torch.testing.assert_close(plain(2), before)
    unbaked = MAKERS[kind]()
    unbaked.load_state_dict(trained)
    assert not unbaked.baked
    torch.testing.assert_close(unbaked(2), before)


@pytest.mark.parametrize("kind", ["mlp", "lstm", "ptuning", "table", "projected"])
def test_inference_mode(kind):
    """Decision 20: made as it is for inference, it is a table alone and runs."""
    module, trained = MAKERS[kind](inference_mode=True), MAKERS[kind]().bake()
    assert list(module.state_dict()) == ["embedding.weight"] and module.baked
    module.load_state_dict(trained.state_dict())
    torch.testing.assert_close(module(3), trained(3))


@ALL
def test_copies_and_pickles(kind):
    module = MAKERS[kind](dropout=0.1).eval()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(2), module(2))
        assert repr(twin) == repr(module)
    module.bake().disable()
    twin = pickle.loads(pickle.dumps(module))
    assert twin.baked and not twin.enabled and "baked, disabled" in repr(twin)


@ALL
def test_compile(kind):
    module = MAKERS[kind]()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(3), module(3))
        compiled(3).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(kind, dtype):
    module, wide = MAKERS[kind](dtype=dtype), MAKERS[kind](dtype=torch.float32)
    wide.load_state_dict(module.state_dict())
    out, gold = module(2), wide(2)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), gold, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert all(p.grad.dtype == dtype for p in module.parameters())


@ALL
def test_autocast(kind):
    module = MAKERS[kind]()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(2)
    torch.testing.assert_close(out.float(), module(2), rtol=0.05, atol=0.05)
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


PAIRS = {
    "embedding": ("PromptTuningConfig", {}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 7}),
    "lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 7, "encoder_reparameterization_type": "LSTM"}),
    "table": ("PrefixTuningConfig", {}),
    "projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 7}),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_pefts_encoders(kind):
    """The same draw from the same seed, the same state dict, the same output."""
    peft = pytest.importorskip("peft")
    name, options = PAIRS[kind]
    sizes = {"num_virtual_tokens": 5, "token_dim": 12, "num_layers": 2, "num_attention_heads": 3}
    config = getattr(peft, name)(num_transformer_submodules=1, **sizes, **options)
    torch.manual_seed(5)
    if kind == "embedding":
        theirs = peft.PromptEmbedding(config, None)
    else:
        theirs = (peft.PrefixEncoder if kind in PREFIXES else peft.PromptEncoder)(config)
    torch.manual_seed(5)
    ours = MAKERS[kind]()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    indices = torch.arange(5).expand(2, -1)
    torch.testing.assert_close(ours(2), theirs(indices))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(indices), theirs(indices))


def tokenizer(text):
    return {"input_ids": [1, *(len(word) for word in text.split()), 2]}


@pytest.mark.parametrize("P, want", [(3, [1, 2, 4]), (5, [1, 2, 4, 3, 2]), (8, [1, 2, 4, 3, 2, 1, 2, 4])])
def test_text_init(P, want):
    """Decision 19: the text's tokens, special ones too, repeated or trimmed; never padded with zeros."""
    words = nn.Embedding(9, 6)
    module = PromptEmbedding(P, 6, init="text", text="it isnt odd", tokenizer=tokenizer, word_embeddings=words)
    assert torch.equal(module(1)[0], words.weight[want])
    table = PromptEmbedding(P, 6, init="text", text="it isnt odd", tokenizer=tokenizer, word_embeddings=words.weight)
    assert torch.equal(table(1)[0], words.weight[want])
    with torch.no_grad():
        module.embedding.weight.zero_()
    assert words.weight.any(dim=1).all()
    half = PromptEmbedding(P, 6, init="text", text="a", tokenizer=tokenizer, word_embeddings=words.bfloat16())
    assert half.embedding.weight.dtype == torch.float32


def test_vocab_init():
    words = nn.Embedding(9, 6)
    module = PromptEmbedding(20, 6, init="vocab", word_embeddings=words)
    rows = {tuple(row) for row in words.weight.tolist()}
    assert all(tuple(row) in rows for row in module.embedding.weight.tolist())


def encoder_layer(batch_first):
    return nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=batch_first).eval()


@pytest.mark.parametrize("batch_first", [False, True])
def test_prepend_prompt(batch_first):
    """Decisions 8 and 9: the prompt stands before the tokens of each sample, wherever the model has its batch."""
    model, module = (
        nn.TransformerEncoder(encoder_layer(batch_first), 1, enable_nested_tensor=False),
        MAKERS["ptuning"](),
    )
    x, padding = torch.randn(2, 4, 12), torch.zeros(2, 4, dtype=torch.bool)
    padding[1, 3:] = True
    labels, positions = torch.randint(0, 3, (2, 4)), torch.arange(4).expand(1, -1)
    given = {
        "key_padding_mask": padding,
        "attention_mask": (~padding).long(),
        "labels": labels,
        "position_ids": positions,
    }
    joined = prepend_prompt(module, x if batch_first else x.transpose(0, 1), model=model, **given)
    out = model(joined.embeddings, src_key_padding_mask=joined.key_padding_mask)
    out = out if batch_first else out.transpose(0, 1)
    assert out.shape == (2, 9, 12)
    gold = encoder_layer(True)
    gold.load_state_dict(model.layers[0].state_dict())
    torch.testing.assert_close(out[0], gold(torch.cat([module.encode(), x[0]])[None])[0])
    alone = model(x if batch_first else x.transpose(0, 1))
    alone = alone if batch_first else alone.transpose(0, 1)
    assert (out[:, 5:] - alone).abs().max() > 1e-3, "the tokens do not see the prompt"
    assert joined.labels.tolist() == [[-100] * 5 + row for row in labels.tolist()]
    assert joined.attention_mask.tolist() == [[1] * 9, [1] * 8 + [0]]
    assert joined.position_ids.tolist() == [list(range(9))]
    loss = nn.functional.cross_entropy(out[..., :3].flatten(0, 1), joined.labels.flatten())
    torch.testing.assert_close(loss, nn.functional.cross_entropy(out[:, 5:, :3].flatten(0, 1), labels.flatten()))


WORDS = nn.Embedding(9, 12)
TEXT = {"init": "text", "text": "a b", "tokenizer": tokenizer, "word_embeddings": WORDS}


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: PromptEmbedding(5, 12, tokens=3), TypeError, "tokens must be a known option"),
        (lambda: PromptEmbedding(num_virtual_token=5, token_dim=12), TypeError, "did you mean num_virtual_tokens"),
        (lambda: PTuningEmbedding(5, 12, 7, droput=0.1), TypeError, "PTuningEmbedding: droput .* did you mean dropout"),
        (lambda: PrefixEncoder(5, 2, 3, 4, projection=8), TypeError, "did you mean projection_dim"),
        (lambda: PrefixTuning(2, 3, 4, 5, prefix_lenght=4), TypeError, "did you mean prefix_length"),
        (lambda: PromptEmbedding(0, 12), ValueError, "num_virtual_tokens must be at least 1, got 0"),
        (lambda: PromptEmbedding(5), TypeError, "token_dim must be an integer, got NoneType"),
        (lambda: PromptEmbedding(5, 12, token_dim=12), TypeError, "token_dim"),
        (lambda: PromptEmbedding(5, 12, embedding_dim=12), ValueError, "token_dim must be given under one name"),
        (lambda: PromptEmbedding(5, 12, "words"), ValueError, "init must be one of random, vocab, text, got 'words'"),
        (lambda: PromptEmbedding(5, 12, "vocab"), ValueError, "word_embeddings must be given for init='vocab'"),
        (lambda: PromptEmbedding(5, 12, **{**TEXT, "text": None}), ValueError, "text must be given for init='text'"),
        (lambda: PromptEmbedding(5, 12, **{**TEXT, "tokenizer": None}), ValueError, "tokenizer must be given"),
        (lambda: PromptEmbedding(5, 12, **{**TEXT, "tokenizer": lambda text: {"input_ids": []}}), ValueError, "text must have at least one token"),
        (lambda: PromptEmbedding(5, 12, **{**TEXT, "tokenizer": lambda text: [3, 9]}), ValueError, r"tokenizer must give ids in \[0, 9\)"),
        (lambda: PromptEmbedding(5, 8, **TEXT), ValueError, r"word_embeddings must have shape .* \[any, 8\], got \[9, 12\]"),
        (lambda: PromptEmbedding(5, 12, "vocab", word_embeddings=3), TypeError, "word_embeddings must be an embedding"),
        (lambda: PromptEncoder(5, 12, "gru"), ValueError, "encoder must be one of mlp, lstm, got 'gru'"),
        (lambda: PromptEncoder(5, 12, num_layers=0), ValueError, "num_layers must be at least 1"),
        (lambda: PromptEncoder(5, 12, dropout=1.0), ValueError, r"dropout must be in \[0, 1\)"),
        (lambda: PTuningEmbedding(5, 12, 7, "0.1"), TypeError, "dropout_probability must be a float"),
        (lambda: PrefixTuning(2, 3, 4), TypeError, "prefix_length must be an integer"),
        (lambda: PrefixTuning(2, 3, 4, 5)(True), TypeError, "batch_size must be an integer"),
        (lambda: PrefixTuning(2, 3, 4, 5)(-1), ValueError, "batch_size must be at least 0"),
        (lambda: PromptEmbedding(5, 12)(torch.ones(2, 5)), TypeError, "batch_size must be a batch size or indices"),
        (lambda: PromptEmbedding(5, 12)(torch.tensor([5])), IndexError, "out of range"),
        (lambda: prepend_prompt(PromptEmbedding(5, 12), torch.ones(2, 4, 12)), ValueError, "batch_first must be given, or the model"),
        (lambda: prepend_prompt(PromptEmbedding(5, 12), torch.ones(2, 4, 12), model=nn.Linear(2, 2)), ValueError, "batch_first must be given where"),
        (lambda: prepend_prompt(PromptEmbedding(5, 12), torch.ones(2, 4, 12), model=nn.ModuleList([encoder_layer(True), encoder_layer(False)])), ValueError, r"\[False, True\] there"),
        (lambda: prepend_prompt(PromptEmbedding(5, 12), torch.ones(2, 4, 8), batch_first=True), ValueError, "embeddings must have shape"),
        (lambda: prepend_prompt(PromptEmbedding(5, 12), torch.ones(2, 4, 12), batch_first=True, labels=torch.ones(4, 2)), ValueError, r"labels must have shape \[batch, tokens\] = \[2, 4\]"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
