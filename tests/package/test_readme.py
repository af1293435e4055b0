"""The README's python blocks run as they stand, on tiny models; its table names all that is exported, and no more."""

import re
from pathlib import Path

import pytest
import torch

import fastpeft

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


class Tokenizer:
    """Three ids a text, as transformers' tokenizers give them."""

    def __call__(self, texts, **_):
        shape = (len(texts), 3)
        return {"input_ids": torch.randint(16, shape), "attention_mask": torch.ones(shape, dtype=torch.int64)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A decoder and an encoder of two layers, saved as a user finds them: {name in the README: folder}."""
    transformers = pytest.importorskip("transformers", reason="the README's models need transformers")
    sizes = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48}  # fmt: skip
    made = {
        "name": transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)),
        "encoder_name": transformers.BertModel(transformers.BertConfig(**sizes)),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.sub(r"\W+", "-", block.splitlines()[-1])[:40])
def test_block(block, folders, tmp_path, monkeypatch):
    """Each block imports what it uses; it is given the names of models, and labels and a tokenizer for the last."""
    for library in ("peft", "safetensors"):
        if library in block:
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    given = {**folders, "tokenizer": Tokenizer(), "labels": torch.tensor([1, 0])}
    exec(compile(block, "README.md", "exec"), given)
    if "accelerate" in block:
        assert fastpeft.restore(given["model"]) == 0


@pytest.mark.cpp
def test_before_and_after_serves(folders):
    """The first block's own model: every layer is accelerated, and a step is counted as served."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(folders["name"])
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))
    report = fastpeft.accelerate(model)
    assert len(report.accelerated) == 14 and not report.skipped
    ids = torch.randint(16, (2, 5))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    status = fastpeft.status(model)
    assert status.served == 14 and not status.left
    assert fastpeft.restore(model) == 14


def test_table_names_what_is_exported():
    table = TEXT[TEXT.index("| method | class or call |") :].split("\n\n")[0]
    rows = [row.split(" | ")[1] for row in table.splitlines()[2:]]
    named = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert len(named) == len(set(named))
    models = {f"models.{name}" for name in fastpeft.models.__all__}
    assert set(named) == set(fastpeft.__all__) - {"__version__", "models"} | models


def test_operators_exist():
    row = next(line for line in TEXT.splitlines() if line.startswith("| operators |"))
    for name in re.findall(r"`(\w+)`", row.split(" | ", 2)[2]):
        assert name in fastpeft.ops.__all__ or name == "3d", name


def test_links_and_folders_exist():
    """What the README links to, and each folder and file of its layout."""
    layout = TEXT[TEXT.index("## Layout") :].split("```")[1]
    paths = re.findall(r"\]\(([\w./]+)\)", TEXT) + re.findall(r"(?<!\S)[\w.]+/[\w./]*", layout)
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path).exists(), path
