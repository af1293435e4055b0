"""The baselines that train neither prompt nor weight: a frozen body with a head, a pattern with a verbaliser."""

import copy

import pytest
import torch
from torch import nn

from fastpeft.nn.prompts import PatternVerbalizer, freeze_body, insert_prompt
from prompt_cases import model, prompt

transformers = pytest.importorskip("transformers")
WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<mask>",
    "<unk>",
    "it",
    "was",
    ".",
    "great",
    "bad",
    "fine",
    "poor",
    "a",
    "film",
    "plot",
    "out",
]


def tokenizer(mask=True, side="right"):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Split(".", "isolated")]
    )
    special = {"mask_token": "<mask>"} if mask else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", padding_side=side, **special
    )


VERBALIZER = {"negative": ["bad", "poor"], "positive": ["great", "fine"]}


def test_masked_language_model():
    """The mean of a label's words at the masked position, wherever padding and an inserted prompt have put it."""
    pet = PatternVerbalizer(tokenizer(), "{text} . it was {mask} .", VERBALIZER)
    assert pet.labels == ["negative", "positive"] and pet.token_ids == [[9, 11], [8, 10]]
    inputs = pet.encode(["a film", "a plot out out"])
    assert inputs["input_ids"].tolist() == [[12, 13, 7, 5, 6, 3, 7, 0, 0], [12, 14, 15, 15, 7, 5, 6, 3, 7]]
    base = model("bert", "MaskedLM")
    logits = base(**inputs).logits
    scores = pet.scores(logits, inputs)
    gold = torch.stack([row[torch.tensor(pet.token_ids)].mean(-1) for row in (logits[0, 5], logits[1, 7])])
    torch.testing.assert_close(scores, gold)
    labels = torch.tensor([1, 0])
    torch.testing.assert_close(pet.loss(logits, inputs, labels), nn.functional.cross_entropy(gold, labels))
    assert pet.predict(logits, inputs) == [pet.labels[i] for i in gold.argmax(-1)]
    prompted = insert_prompt(copy.deepcopy(base), prompt())
    logits = prompted(**inputs).logits
    gold = torch.stack([row[torch.tensor(pet.token_ids)].mean(-1) for row in (logits[0, 8], logits[1, 10])])
    torch.testing.assert_close(pet.scores(logits, inputs), gold)
    pet.loss(logits, inputs, labels).backward()
    assert prompted.prompt.embedding.weight.grad.any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_language_model(side):
    """Without a mask token, what the last real token predicts."""
    pet = PatternVerbalizer(tokenizer(mask=False, side=side), "{text} . it was {mask}", VERBALIZER)
    inputs = pet.encode(["a film", "a plot out out"])
    inputs.pop("token_type_ids", None)
    logits = model("gpt2")(**inputs).logits
    last = (4, 6) if side == "right" else (6, 6)
    gold = torch.stack([logits[i, t][torch.tensor(pet.token_ids)].mean(-1) for i, t in enumerate(last)])
    torch.testing.assert_close(pet.scores(logits, inputs), gold)
    assert pet.positions(inputs).tolist() == list(last)
    torch.testing.assert_close(pet.scores(logits[torch.arange(2), pet.positions(inputs)], inputs), gold)
    with pytest.raises(ValueError, match=r"logits must be \[2, T, V\] or \[2, V\], got \[3, "):
        pet.scores(logits.new_zeros(3, logits.shape[-1]), inputs)


def test_fields_and_functions():
    pet = PatternVerbalizer(tokenizer(), "{first} {mask} {second}", VERBALIZER)
    assert pet.text({"first": "a film", "second": "{out}"}) == "a film <mask> {out}"
    own = PatternVerbalizer(tokenizer(), lambda example: f"<mask> {example}", {0: "bad", 1: "great"})
    assert own.encode(["a film"])["input_ids"].tolist() == [[3, 12, 13]]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: PatternVerbalizer(tokenizer(), "{text}", VERBALIZER), ValueError, r"pattern must have \{mask\} once"),
        (lambda: PatternVerbalizer(tokenizer(False), "{mask} {text}", VERBALIZER), ValueError, r"pattern must end with \{mask\}"),
        (lambda: PatternVerbalizer(tokenizer(), "{mask}", {"one": "bad"}), ValueError, "verbalizer must have at least two labels"),
        (lambda: PatternVerbalizer(tokenizer(), "{mask}", {0: "bad", 1: "a film"}), ValueError, "'a film' is not, got 2 tokens"),
        (lambda: PatternVerbalizer(tokenizer(), "{mask}", {0: "bad", 1: []}), ValueError, "at least one word a label"),
        (lambda: PatternVerbalizer(tokenizer(), 3, VERBALIZER), TypeError, "pattern must be a string or a function"),
        (lambda: PatternVerbalizer(tokenizer(), "{mask}", ["bad"]), TypeError, "verbalizer must map labels to words"),
        (lambda: PatternVerbalizer(None, "{mask}", VERBALIZER), TypeError, "tokenizer must be callable"),
        (lambda: PatternVerbalizer(tokenizer(), str, VERBALIZER).scores(torch.ones(1, 2, 16), {"input_ids": torch.tensor([[5, 6]])}), ValueError, r"mask token once in every example, got \[0\]"),
        (lambda: freeze_body(3), TypeError, "model must be an nn.Module"),
        (lambda: freeze_body(nn.Linear(2, 2)), ValueError, "head must be given"),
        (lambda: freeze_body(model("bert"), "score"), ValueError, "head must name a module of the model, got 'score'"),
        (lambda: freeze_body(model("gpt2")), ValueError, "head must have parameters of its own, got none"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_freeze_body():
    """What stands outside the body trains, the rest does not move; tied weights belong to the body."""
    ours = model("bert", "SequenceClassification")
    assert freeze_body(ours) == ["classifier.weight", "classifier.bias"]
    assert freeze_body(ours, ["classifier", "pooler"])[0] == "bert.pooler.dense.weight"
    freeze_body(ours)
    before = copy.deepcopy(ours.state_dict())
    ids, labels = torch.randint(5, 40, (4, 6)), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    ours(ids, labels=labels).loss.backward()
    optimizer.step()
    moved = {name for name, value in ours.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    plain = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    assert freeze_body(plain, "2") == ["2.weight", "2.bias"] and not plain[0].weight.requires_grad
