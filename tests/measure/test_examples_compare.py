"""The measured comparisons from end to end on models of two layers and made-up data: a few seconds, nothing fetched."""

import dataclasses
import hashlib
import io
import json
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

import _measure
import finetune_minilm
import finetune_qlora
import finetune_smollm2
from _training import Lora, Task
from fastpeft.cli import assets, data

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
    lora = Lora(rank=4, alpha=8, dropout=dropout)
    return Task("tiny", kind, build, lora, train, test, 5e-3, False, torch.device("cpu"), 0, folder)


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
    train = data.bucketed(tokenizer, rows[:160], 8, 16, shuffle_seed=0) * 3
    test = data.bucketed(tokenizer, rows[160:], 16, 16)
    summary = finetune_minilm.run(task(tiny_bert, "SEQ_CLS", train, test, tmp_path, 0.1), out)
    check_outputs(summary, tmp_path, tiny_bert)
    assert all(run["accuracy"] > 0.9 for run in summary["runs"].values())
    assert summary["baseline"]["accuracy"] > 0.6
    printed = out.file.getvalue()
    for said in ("Step time, accelerated / plain", "Honest baseline", "bit for bit", "kept for backward"):
        assert said in printed


def test_smollm2(tmp_path, out):
    """A Llama with grouped queries: the loss falls in both runs, and samples are drawn before and after."""
    summary = finetune_smollm2.run(llama_task(tmp_path), word_tokenizer(), 4, out)
    check_outputs(summary, tmp_path, tiny_llama)
    assert all(run["loss"] < summary["before"]["loss"] for run in summary["runs"].values())
    assert {"sample_before", "sample_after"} <= summary.keys()


def test_without_dropout_both_runs_agree(tmp_path, out):
    """With no mask to differ in, only rounding is left between plain and accelerated, over the whole run."""
    summary = finetune_smollm2.run(llama_task(tmp_path, 0.0, 8), word_tokenizer(), 0, out)
    assert summary["loss_curves"]["largest_step_difference"] < 1e-4
    assert "a single step differs" in out.file.getvalue()


def llama_task(folder, dropout=0.1, steps=12):
    blocks = data.text_blocks(word_tokenizer(), "good film bad plot the actor and scene " * 60, 16)
    train, test = data.block_batches(blocks, 4, steps), data.block_batches(blocks[:4], 2)
    return task(tiny_llama, "CAUSAL_LM", train, test, folder, dropout)


def test_qlora(tmp_path, out):
    """Both runs learn, and the files hold what was returned."""
    summary = finetune_qlora.run(llama_task(tmp_path), out, {"LoRA": 2_000_000, "QLoRA": 1_000_000}.get)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["adapter"] == summary["adapter"]
    assert written["adapter"]["reloaded_equals_trained_bitwise"] is True
    plain, ours = written["runs"].values()
    for run in (plain, ours):
        assert run["loss"] < run["before"]["loss"] and len(run["train_losses"]) == 12
    elements = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert written["frozen_elements"] == elements and plain["frozen_bytes"] == 4 * elements
    assert elements / 2 < ours["frozen_bytes"] < plain["frozen_bytes"]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    printed = out.file.getvalue()
    for said in ("Step time, QLoRA / LoRA", "bits an element", "bit for bit", "2.0 MB", "1.0 MB"):
        assert said in printed


def test_qlora_starts_where_lora_does(tmp_path):
    """The same adapter in both; a head that is not adapted; the losses differ by the rounding to 4 bits alone."""
    one = llama_task(tmp_path)
    plain, ours = (finetune_qlora.make(one, name) for name in finetune_qlora.RUNS)
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    others = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == others.keys() and all("lora_" in name for name in trained)
    assert all(torch.equal(p, others[name]) for name, p in trained.items())
    assert type(ours.lm_head) is nn.Linear


def test_qlora_refuses_another_adapter(tmp_path):
    one = llama_task(tmp_path)
    model = finetune_qlora.make(one, "QLoRA")
    finetune_qlora.save_adapter(model.model.layers[0], tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="names must be those of the adapter"):
        finetune_qlora.load_adapter(model, tmp_path / "part.safetensors")


def test_qlora_command(tmp_path):
    """From the command line, with the two processes of their own whose memory is measured."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    tiny_llama().save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    text.write_text("good film bad plot the actor and scene " * 60)
    shared = ["--model", str(model), "--data", str(text), "--output", str(tmp_path / "out"), "--steps", "2"]
    assert finetune_qlora.main([*shared, "--max-length", "16", "--batch-size", "2"]) == 0
    runs = json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]
    if Path("/proc/self/status").is_file():
        assert all(run["resident_bytes"] > 50e6 for run in runs.values())


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
    batches = data.bucketed(word_tokenizer(), sentences(50), 8, 16)
    assert sum(len(batch["labels"]) for batch in batches) == 50
    assert all((batch["attention_mask"].sum(1) > 0).all() for batch in batches)
    padding = sum(int((1 - batch["attention_mask"]).sum()) for batch in batches)
    assert padding / sum(batch["input_ids"].numel() for batch in batches) < 0.1
    assert {len(b["labels"]) for b in data.bucketed(word_tokenizer(), sentences(50), 8, 16, shuffle_seed=0)} == {8}


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
    found = data.labelled_file(file, seed=0)
    assert found.classes == ["no", "yes"]
    assert sorted(found.train + found.test) == [("bad plot", 0), ("good film", 1)]


@pytest.mark.parametrize("name, text, message", [
    ("mine.xml", "<a/>", r"file must end in \.tsv"),
    ("mine.csv", "sentence,label\ngood,1\n", "columns text and label"),
    ("mine.csv", "text,label\ngood,1\n", "two values or more"),
])  # fmt: skip
def test_labelled_file_bad_input(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        data.labelled_file(tmp_path / name, seed=0)


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
    pin = assets.Package(
        name="thing",
        version="1.0",
        sha256=assets.sha256(archive),
        members=("thing-1.0/data/wanted.txt",),
        checked={"wanted.txt": digest},
        what="a thing",
        licence="none",
        source=True,
    )
    return pin, archive


def test_fetch_copies_the_wanted_file_only(tmp_path, package, monkeypatch):
    pin, archive = package
    monkeypatch.setattr(assets, "_download", lambda package, scratch: archive)
    folder = assets.fetch(pin, tmp_path / "cache")
    assert [file.name for file in folder.iterdir()] == ["wanted.txt"]
    monkeypatch.setattr(assets, "_download", None)  # the second call must not need it
    assert assets.fetch(pin, tmp_path / "cache") == folder
    (folder / "wanted.txt").write_text("changed")
    with pytest.raises(assets.AssetError, match="must have sha256"):
        assets.fetch(pin, tmp_path / "cache")
    assert sorted(entry.name for entry in (tmp_path / "cache").iterdir()) == ["thing-1.0"]


def test_fetch_tells_why_pip_failed(tmp_path, package, monkeypatch):
    pin, _ = package
    done = assets.subprocess.CompletedProcess([], 1, "", "ERROR: no such host\n")
    monkeypatch.setattr(assets.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(assets.AssetError, match=r"a thing .thing==1\.0.*ERROR: no such host"):
        assets.fetch(pin, tmp_path / "cache")
    assert not (tmp_path / "cache" / "thing-1.0").exists()


def test_fetch_refuses_another_archive_of_debian(tmp_path, package, monkeypatch):
    """apt-get checks no hash of ours: the archive is refused before anything opens it."""
    pin, _ = package

    def download(command, cwd, **options):
        assert command[:2] == ["apt-get", "download"] and command[-1] == "thing=1.0"
        (cwd / "thing_1.0_all.deb").write_bytes(b"another")
        return assets.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", download)
    with pytest.raises(assets.AssetError, match=r"thing_1\.0_all\.deb must have sha256"):
        assets.fetch(dataclasses.replace(pin, debian=True), tmp_path / "cache")
    assert not (tmp_path / "cache" / "thing-1.0").exists()
