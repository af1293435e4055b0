"""The python blocks of the README and the guide run as they stand, on tiny models; the table of names has all that is exported."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpeft

ROOT = Path(__file__).parents[2]
GUIDE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", *GUIDE]
FENCED = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in [ROOT / "README.md", *GUIDE]
    for number, block in enumerate(FENCED.findall(path.read_text()))
]


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


@pytest.mark.parametrize("block", BLOCKS)
def test_block(block, folders, tmp_path, monkeypatch):
    """Each block imports what it uses; it is given the names of models, and labels and a tokenizer for the last."""
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) or (isinstance(node, ast.Import) and node.names[0].name != "fastpeft"):
            name = getattr(node, "module", None) or node.names[0].name
            pytest.importorskip(name.partition(".")[0], reason=f"the block imports {name}")
    if "safetensors" in block:
        pytest.importorskip("safetensors", reason="the block writes a file")
    monkeypatch.chdir(tmp_path)
    given = {**folders, "tokenizer": Tokenizer(), "labels": torch.tensor([1, 0])}
    exec(compile(block, "block", "exec"), given)


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


METHODS = (ROOT / "docs/methods.md").read_text()


def test_table_names_what_is_exported():
    table = METHODS[METHODS.index("| method | class or call |") :].split("\n\n")[0]
    rows = [row.split(" | ")[1] for row in table.splitlines()[2:]]
    named = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert len(named) == len(set(named))
    models = {f"models.{name}" for name in fastpeft.models.__all__}
    assert set(named) == set(fastpeft.__all__) - {"__version__", "models"} | models


def test_operators_exist():
    row = next(line for line in METHODS.splitlines() if line.startswith("| operators |"))
    for name in re.findall(r"`(\w+)`", row.split(" | ", 2)[2]):
        assert name in fastpeft.ops.__all__ or name == "3d", name


def test_links_and_folders_exist():
    """What the pages link to, and each folder and file of the layout in DESIGN.md."""
    text = (ROOT / "DESIGN.md").read_text()
    layout = text[text.index("## The house") :].split("```")[1]
    paths = [ROOT / path for path in re.findall(r"(?<!\S)[\w.]+/[\w./]*", layout)]
    for page in PAGES:
        paths += [page.parent / link for link in re.findall(r"\]\(([\w./-]+?)(?:#[\w-]+)?\)", page.read_text())]
    assert len(paths) > 30
    assert not [str(path) for path in paths if not path.exists()]


def test_readme_is_one_screen():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110 and len(text.split()) <= 900


def test_pages_build(tmp_path):
    """Without a warning: the guide, and a page for every public name."""
    for library in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(library, reason="the pages are built by sphinx, myst-parser and furo")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "text", "-d", str(tmp_path / "doctrees")]
    done = subprocess.run([*command, str(ROOT / "docs"), str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out/api/fastpeft.txt").read_text()
    missing = [name for name in fastpeft.__all__ if callable(getattr(fastpeft, name)) and f"{name}(" not in page]
    assert not missing
