"""fastpeft.models: pretrained weights kept and frozen, adapters in the model's own layers, a trained head."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastpeft import lora_disabled
from fastpeft.models import LoRABERT, SentimentClassifier
from fastpeft.nn import LoRALinear

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
PER_LAYER = 4 * 4 * (16 + 16) + 2 * 4 * (16 + 24)  # rank 4: q, k, v, attention output; both MLP layers


def bert(kind="BertModel", **config):
    return getattr(transformers, kind)(transformers.BertConfig(**SMALL, **config)).eval()


def inputs(rows=3):
    ids = torch.randint(1, 40, (rows, 5))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    return {"input_ids": ids, "token_type_ids": torch.tensor([0, 0, 1, 1, 1]).expand(rows, -1), "attention_mask": mask}


def moved(model):
    """Every adapter away from zero."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.normal_()
    return model


def test_adapts_in_place_and_freezes():
    base = bert()
    plain, batch = copy.deepcopy(base), inputs()
    model = LoRABERT(base)
    assert model.bert is base
    adapted = [name for name, module in base.named_modules() if isinstance(module, LoRALinear)]
    layer = "encoder.layer.0."
    assert adapted[:6] == [layer + part for part in (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "intermediate.dense", "output.dense")] and len(adapted) == 12  # fmt: skip
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in trained)
    assert model.count_trainable_parameters() == 2 * PER_LAYER
    assert model.count_parameters() == 2 * PER_LAYER + sum(p.numel() for p in plain.parameters())
    # The pretrained weights are there, under their names.
    assert all(torch.equal(dict(base.named_parameters())[name], p) for name, p in plain.named_parameters())
    y, ours = plain(**batch), model(**batch)
    assert torch.equal(ours.last_hidden_state, y.last_hidden_state) and torch.equal(ours.pooler_output, y.pooler_output)
    assert not torch.allclose(moved(model)(**batch).last_hidden_state, y.last_hidden_state)
    with lora_disabled(model):
        assert torch.equal(model(**batch).last_hidden_state, y.last_hidden_state)


def test_options():
    query = LoRABERT(bert()).bert.encoder.layer[0].attention.self.query
    assert (query.rank, query.scaling, query.init, query.dropout_probability) == (4, 0.01, "randn", 0.0)
    query = LoRABERT(bert(), 2, alpha=8, dropout=0.1).bert.encoder.layer[1].attention.self.query
    assert (query.rank, query.scaling, query.init, query.dropout_probability) == (2, 4.0, "kaiming", 0.1)


def test_head_of_a_given_model():
    model = LoRABERT(bert("BertForSequenceClassification", num_labels=3))
    names = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert names == {"bert.classifier.weight", "bert.classifier.bias"}
    model(**inputs(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None for p in model.get_trainable_parameters())
    frozen = LoRABERT(bert("BertForSequenceClassification"), train_head=False)
    assert all("lora_" in name for name, p in frozen.named_parameters() if p.requires_grad)
    # What is tied to the body stays frozen.
    lm = LoRABERT(bert("BertForMaskedLM"))
    assert not lm.bert.bert.embeddings.word_embeddings.weight.requires_grad


@pytest.mark.parametrize("kind", ["DistilBert", "Roberta", "Electra", "Albert"])
def test_relatives(kind):
    sizes = {"dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 24} if kind == "DistilBert" else {}
    config = getattr(transformers, kind + "Config")(**SMALL, **sizes, pad_token_id=0, embedding_size=16)
    base = getattr(transformers, kind + "Model")(config).eval()
    plain, batch = copy.deepcopy(base), inputs()
    if kind in ("DistilBert", "Roberta"):
        del batch["token_type_ids"]
    model = SentimentClassifier(base, 3)
    assert torch.equal(model.bert(**batch)[0], plain(**batch)[0])
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == (6 if kind == "Albert" else 12)
    logits = model(**batch)
    assert logits.shape == (3, 3)
    logits.sum().backward()
    assert model.classifier.weight.grad is not None


def test_classifier():
    base = bert()
    plain, batch = copy.deepcopy(base), inputs()
    model = SentimentClassifier(base, num_classes=5)
    logits = model(**batch)
    torch.testing.assert_close(logits, model.classifier(plain(**batch).pooler_output))
    assert model.count_trainable_parameters() == 2 * PER_LAYER + 17 * 5
    labels = torch.tensor([0, 4, 2])
    loss, again = model(**batch, labels=labels)
    assert torch.equal(again, logits)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels))
    torch.testing.assert_close(model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]), logits)


def test_classifier_keeps_the_head_it_is_given():
    base = bert("BertForSequenceClassification", num_labels=3)
    plain, batch = copy.deepcopy(base), inputs()
    model = SentimentClassifier(base, 3)
    assert torch.equal(model(**batch), plain(**batch).logits)
    assert model.bert.classifier.weight.requires_grad and not model.bert.bert.pooler.dense.weight.requires_grad
    for kind, message in (("BertForSequenceClassification", "num_classes must be 3, as the model has, got 2"),
                          ("BertForMaskedLM", "model must be an encoder or a classifier")):  # fmt: skip
        other = bert(kind, num_labels=3)
        with pytest.raises(ValueError, match=message):
            SentimentClassifier(other, 2)
        assert not any(isinstance(m, LoRALinear) for m in other.modules())


def test_training_learns_and_leaves_the_base():
    model = SentimentClassifier(bert(initializer_range=0.3), alpha=16).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(2, 40, (16, 5))
    ids[::2, 2] = 1
    labels = (ids == 1).any(1).long()
    optimizer = torch.optim.AdamW(model.get_trainable_parameters(), 2e-2)
    for _ in range(40):
        loss, logits = model(input_ids=ids, labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (logits.argmax(-1) == labels).all() and loss < 0.2
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    # No dropout anywhere: evaluation is the training's forward.
    torch.testing.assert_close(model.eval()(input_ids=ids), model.train()(input_ids=ids))


def test_merge():
    model, batch = moved(LoRABERT(bert(), alpha=4)), inputs()
    y, weights = model(**batch).last_hidden_state, {n: p.clone() for n, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.merge() is model
    torch.testing.assert_close(model(**batch).last_hidden_state, y, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.unmerge()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    # One that cannot: none is merged.
    last = model.bert.encoder.layer[1].output.dense
    with torch.no_grad():
        last.lora_B.fill_(torch.inf)
    with pytest.raises(ValueError, match="stay finite"):
        model.merge()
    assert not any(m.merged for m in model.modules() if isinstance(m, LoRALinear))


def test_state():
    model, twin, batch = SentimentClassifier(bert()), SentimentClassifier(bert()), inputs()
    twin.bert.load_state_dict(model.bert.state_dict())
    moved(model)
    state = model.efficient_state_dict()
    assert len(state) == 24 + 2 and sum(v.numel() for v in state.values()) == model.count_trainable_parameters()
    twin.load_efficient_state_dict(state)
    assert torch.equal(twin(**batch), model(**batch))
    before = {name: value.clone() for name, value in twin.efficient_state_dict().items()}
    name = "bert.encoder.layer.0.output.dense.lora_A"
    for broken, error, message in (
        ({k: v for k, v in state.items() if k != name}, ValueError, f"have every trained tensor, got no {name}"),
        (state | {"bert.pooler.dense.weight": torch.ones(1)}, ValueError, "got also bert.pooler.dense.weight"),
        (state | {name: state[name][1:]}, ValueError, "lora_A must have shape"),
        (state | {name: state[name] * torch.nan}, ValueError, "lora_A must be finite"),
        (state | {name: state[name].long()}, TypeError, "lora_A must be floating point"),
        (state | {name: 1.0}, TypeError, "lora_A must be a tensor"),
        ([state], TypeError, "state must be a state dict"),
    ):
        broken = (
            {k: v + 1 if isinstance(v, torch.Tensor) and k != name else v for k, v in broken.items()}
            if isinstance(broken, dict)
            else broken
        )
        with pytest.raises(error, match=message):
            twin.load_efficient_state_dict(broken)
        assert all(torch.equal(value, before[key]) for key, value in twin.efficient_state_dict().items())
    # A merged model is unmerged by loading; one frozen by hand is saved whole.
    twin.merge().load_efficient_state_dict(state)
    assert torch.equal(twin(**batch), model(**batch))
    model.requires_grad_(False)
    assert model.efficient_state_dict().keys() == state.keys()


@pytest.mark.parametrize("name", ["trained.safetensors", "trained.pt"])
def test_files(tmp_path, name):
    model, twin, batch = moved(SentimentClassifier(bert())), SentimentClassifier(bert()), inputs()
    twin.bert.load_state_dict(model.bert.state_dict(), strict=False)
    twin.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k not in model.efficient_state_dict()}, strict=False
    )
    model.save_efficient_weights(tmp_path / name)
    twin.load_efficient_weights(str(tmp_path / name))
    assert torch.equal(twin(**batch), model(**batch))
    with pytest.raises(ValueError, match="path must hold weights of a LoRABERT, got SentimentClassifier"):
        LoRABERT(bert()).load_efficient_weights(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        twin.load_efficient_weights(tmp_path / "no.pt")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    with pytest.raises(ValueError, match="SentimentClassifier: path must be a file that save_efficient_weights wrote"):
        twin.load_efficient_weights(tmp_path / name)


def test_copies_checkpointing_and_precision():
    model, batch = moved(SentimentClassifier(bert(), alpha=4, dropout=0.3)).train(), inputs()

    def gradients(model):
        torch.manual_seed(3)
        model.zero_grad()
        model(**batch).square().sum().backward()
        return [p.grad.clone() for p in model.get_trainable_parameters()]

    plain = gradients(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(gradients(twin), plain, strict=True))
    model.gradient_checkpointing_enable()
    for ours, theirs in zip(gradients(model), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    for module in model.modules():
        module.gradient_checkpointing = False
    y = model.eval()(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**batch).float(), y, rtol=0.1, atol=0.1)
    half = moved(SentimentClassifier(bert().bfloat16()))
    assert half.classifier.weight.dtype == torch.float32
    half(**batch).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in half.get_trainable_parameters())
    assert half.bfloat16()(**batch).dtype == torch.bfloat16


def test_compile():
    model, batch = moved(SentimentClassifier(bert())), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch), model(**batch))


def test_from_a_folder(tmp_path):
    base = bert()
    base.save_pretrained(tmp_path)
    batch = inputs()
    for path in (str(tmp_path), tmp_path):
        model = LoRABERT(path)
        assert torch.equal(model(**batch).last_hidden_state, base(**batch).last_hidden_state)
    # A checkpoint without a pooler: the new one is trained with the head.
    del base.pooler
    base.pooler = None
    base.save_pretrained(tmp_path)
    model = SentimentClassifier(tmp_path, 3)
    assert model.bert.pooler.dense.weight.requires_grad
    assert "bert.pooler.dense.bias" in model.efficient_state_dict()
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    # A saved classifier brings its head, where that has as many classes.
    whole = bert("BertForSequenceClassification", num_labels=3)
    whole.save_pretrained(tmp_path)
    assert torch.equal(SentimentClassifier(tmp_path, 3)(**batch), whole(**batch).logits)
    assert SentimentClassifier(tmp_path, 2)(**batch).shape == (3, 2)


def test_bad_input(tmp_path):
    for call, error, message in (
        (
            lambda: LoRABERT(3),
            TypeError,
            "LoRABERT: model must be a model, a local folder or a name on the hub, got int",
        ),
        (lambda: LoRABERT(tmp_path / "no"), ValueError, "model must be a folder that exists"),
        (lambda: SentimentClassifier("./no"), ValueError, "model must be a folder that exists"),
        (lambda: LoRABERT(nn.Linear(2, 2)), ValueError, "model must have nn.Linear in an nn.ModuleList"),
        (lambda: LoRABERT(bert(), r=2), TypeError, "r must be a known option, got an unknown one: did you mean rank"),
        (lambda: LoRABERT(bert(), 0), ValueError, "rank must be at least 1, got 0"),
        (lambda: SentimentClassifier(bert(), 1), ValueError, "num_classes must be at least 2"),
        (lambda: SentimentClassifier(bert(), 2, lora_dropout=0.1), TypeError, "did you mean dropout"),
        (lambda: LoRABERT(bert(), dropout=2.0), ValueError, "dropout must be"),
    ):
        with pytest.raises(error, match=message):
            call()
    base = bert()
    base.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None)
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match="have no hooks"):
        LoRABERT(base)
    assert flags == [p.requires_grad for p in base.parameters()]
    assert not any(isinstance(m, LoRALinear) for m in base.modules())


@pytest.mark.parametrize("absent", ["transformers", "torchvision"])
def test_import_without(absent):
    code = f"""
import sys
sys.modules[{absent!r}] = None
import fastpeft
from fastpeft import models
try:
    {"models.LoRABERT('bert-base-uncased')" if absent == "transformers" else "models.LoRAResNet(3)"}
except ImportError as error:
    print(error)
assert not [name for name in sys.modules if name.startswith(("transformers.", "torchvision."))]
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert f"{absent} must be installed" in said
