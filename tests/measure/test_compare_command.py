"""`fastpeft compare` on models of a few thousand weights and made-up data: seconds, nothing fetched."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for needed in ("rich", "matplotlib"):
    pytest.importorskip(needed, reason=f"the command needs {needed}: pip install fastpeft[compare]")

from fastpeft.cli import main as front
from fastpeft.cli import measure
from fastpeft.cli.compare import grid, main, record
from fastpeft.cli.compare.methods import METHODS

try:
    import transformers
except ImportError:
    transformers = None
needs_transformers = pytest.mark.skipif(transformers is None, reason="a model of transformers is trained here")

OWN = """
import os, signal
import torch
from torch import nn
from fastpeft.cli.compare import Task

built = []

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))

def make():
    torch.manual_seed(0)
    weights = Net().state_dict()
    x = torch.randn(96, 16)
    y = (x @ torch.randn(16, 3)).argmax(-1)

    def build(seed):
        built.append(seed)
        if os.environ.get("KILL_AT") == str(len(built)):
            os.kill(os.getpid(), signal.SIGKILL)
        net = Net()
        net.load_state_dict(weights)
        return net

    def train(seed, epoch):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed + 100 * epoch))
        return [{"x": x[i], "labels": y[i]} for i in order.split(16)]

    return Task(
        name="tiny", build=build, train=train, test=[{"x": x[64:], "labels": y[64:]}], head=("head",),
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["labels"]),
        score=lambda model, batch: float((model(batch["x"]).argmax(-1) == batch["labels"]).sum()),
        targets=lambda model: ["body"], adapter_targets=("body",), head_rate=1e-2,
    )

def nothing():
    return 3
"""


@pytest.fixture
def own(tmp_path):
    """Options for the task above and a folder."""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return ["--task", f"{file}:make", "--out", str(tmp_path / "out"), "--threads", "1", "--rounds", "2"]


def runs(own):
    return json.loads((Path(own[3]) / "compare.json").read_text())["runs"]


def test_table_plots_and_what_fails(own, capsys):
    """Two methods learn; one cannot serve this model: a row with its error, and the exit status says so."""
    assert front(["compare", *own, "--methods", "none,lora,prompt,head", "--seeds", "2", "--epochs", "20"]) == 1
    found = runs(own)
    assert len(found) == 8
    assert found["prompt | seed 1"]["error"].startswith("ValueError: compare: method prompt must have a model of")
    for seed in (0, 1):
        metric = {name: found[f"{name} | seed {seed}"]["metric"] for name in ("none", "lora", "head")}
        assert metric["none"] < metric["head"] and metric["none"] < metric["lora"]
    assert found["lora | seed 0"]["trainable"] == 8 * (16 + 16) + 17 * 3
    assert [step for step, _ in found["lora | seed 0"]["curve"]][-1] == 80
    folder = Path(own[3])
    table = (folder / "compare.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in table.splitlines() if line.startswith("| ")}
    assert "±" in rows["lora"][1] and rows["lora"][2:5] == ["2", "0.001", "307"] and rows["none"][4] == "0"
    assert "must have a model of transformers" in rows["prompt"][-1]
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "lora | seed 0: accuracy" in printed and "kept" in printed


def test_every_method_sees_the_same_batches(own, monkeypatch):
    """In the same order, another one for each seed."""
    from fastpeft.cli.compare import training

    seen = {}
    step = training.Trainer.step

    def spy(self, batch, number):
        seen.setdefault(current[-1], []).append(batch["labels"].tolist())
        return step(self, batch, number)

    current = []
    prepared = training.prepared

    def note(task, name, options, seed, *rest):
        current.append((name, seed))
        return prepared(task, name, options, seed, *rest)

    monkeypatch.setattr(training.Trainer, "step", spy)
    monkeypatch.setattr(training, "prepared", note)
    monkeypatch.setattr("fastpeft.cli.compare.command.costs.measure", lambda *rest: {"memory": {}, "busy": False})
    monkeypatch.setattr("fastpeft.cli.compare.report.notes", lambda data: [])
    assert main([*own, "--methods", "lora,full", "--seeds", "2", "--steps", "6", "--no-plots"]) == 0
    assert seen["lora", 0] == seen["full", 0] and seen["lora", 1] == seen["full", 1]
    assert seen["lora", 0] != seen["lora", 1]


def test_goes_on_after_a_kill(own):
    """The process is killed in its second run: the first is in the file, and the next call trains the others only."""
    options = [*own, "--methods", "lora,head", "--seeds", "1", "--steps", "4", "--no-plots"]
    killed = subprocess.run(
        [sys.executable, "-m", "fastpeft", "compare", *options],
        env={**os.environ, "KILL_AT": "2"},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL
    first = runs(own)
    assert list(first) == ["lora | seed 0"]
    assert main(options) == 0
    assert runs(own)["lora | seed 0"] == first["lora | seed 0"] and "metric" in runs(own)["head | seed 0"]
    assert [file.name for file in Path(own[3]).iterdir() if file.suffix == ".part"] == []


def test_grows_refuses_and_retimes(own, capsys):
    """More seeds and methods join; other settings are refused by name; --retime leaves every run as it is."""
    assert main([*own, "--methods", "lora", "--seeds", "1", "--steps", "4", "--no-plots"]) == 0
    once = runs(own)
    assert (
        main([*own, "--methods", "lora,sparse", "--grid", "rank=2,4", "--seeds", "1", "--steps", "4", "--no-plots"])
        == 0
    )
    grown = runs(own)
    assert grown.items() >= once.items()
    assert {"lora rank=2 | seed 0", "lora rank=4 | seed 0", "sparse rank=4 | seed 0"} < grown.keys()
    assert grown["lora rank=2 | seed 0"]["trainable"] == 2 * 32 + 51
    file = Path(own[3]) / "compare.json"
    before = file.read_bytes()
    assert main([*own, "--methods", "lora", "--steps", "5", "--no-plots"]) == 2
    assert "steps 4 there, 5 now" in capsys.readouterr().err and file.read_bytes() == before
    costs = json.loads(before)["costs"]
    assert costs["memory"].keys() == {"lora", "lora rank=2", "lora rank=4", "sparse rank=2", "sparse rank=4"}
    assert main(["--retime", "--out", own[3], "--threads", "1", "--rounds", "3", "--no-plots"]) == 0
    after = json.loads(file.read_bytes())
    assert after["runs"] == grown and after["costs"]["rounds"] == 3
    assert after["costs"]["memory"] == costs["memory"] and after["costs"]["time"] != costs["time"]


@pytest.mark.parametrize("options, said", [
    (["--methods", "lorra"], r"--methods must be among lora, .*got 'lorra'; did you mean lora\?"),
    (["--methods", ","], "must name at least one method"),
    (["--task", "sentimnt"], r"got 'sentimnt'; did you mean sentiment\?"),
    (["--task", "nowhere.py:make"], "--task must name a file, as in my_task.py:make"),
    (["--methods", "lora", "--grid", "ranks=2"], r"--grid must be among lr, rank, .*did you mean rank\?"),
    (["--methods", "head", "--grid", "rank=2"], "--grid must be among lr, got 'rank'"),
    (["--methods", "lora", "--grid", "rank"], "--grid must be options with values, as rank=4,8, got 'rank'"),
    (["--methods", "lora", "--grid", "rank=two"], "--grid rank must be of kind int, got 'two'"),
    (["--steps", "0"], "--steps must be at least 1, got 0"),
    (["--epochs", "-1"], "--epochs must be above 0"),
    (["--retime"], "--retime must find"),
    (["--device", "abacus"], "--device must be one that torch has here, got 'abacus'"),
])  # fmt: skip
def test_bad_options(tmp_path, capsys, options, said):
    assert main([*options, "--out", str(tmp_path / "out")]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--metods", "lora"])
    assert ended.value.code == 2 and "did you mean --methods?" in capsys.readouterr().err


def test_own_function_must_return_a_task(own, capsys):
    assert main(["--task", own[1].replace(":make", ":nothing"), *own[2:]]) == 2
    assert "returns a fastpeft.cli.compare.Task, got int" in capsys.readouterr().err


def test_points():
    """Every combination of what a method has; once where it has none of it."""
    wanted = grid.grid(["rank=2,4", "lr=1e-3,1e-2"], ["lora", "head", "none"])
    assert list(grid.points(["lora", "head", "none"], wanted)) == [
        "lora rank=2 lr=0.001", "lora rank=2 lr=0.01", "lora rank=4 lr=0.001", "lora rank=4 lr=0.01",
        "head lr=0.001", "head lr=0.01", "none",
    ]  # fmt: skip
    assert grid.grid(["pattern=2:4,block", "alpha=4"], ["sparse"]) == {"pattern": ["2:4", "block"], "alpha": [4.0]}


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "compare.json"
    made = record.Record(file, {"steps": 1})
    made.add("lora | seed 0", {"method": "lora", "options": {}, "seed": 0, "metric": 0.5})
    whole = file.read_bytes()

    def full(*rest):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        made.add("lora | seed 1", {"method": "lora", "options": {}, "seed": 1, "metric": 0.5})
    assert file.read_bytes() == whole and [each.name for each in tmp_path.iterdir()] == ["compare.json"]
    file.write_text("{")
    with pytest.raises(ValueError, match=r"must hold a comparison's compare\.json, got no JSON"):
        record.Record(file, {"steps": 1})


def test_peak_allocated_is_that_of_the_tensors():
    """x + 1 and its double are alive at once, the half is not; the sum is a number."""
    x = torch.randn(1000, 1000)
    peak = measure.peak_allocated(torch.device("cpu"), lambda: ((x + 1) * 2).sum())
    assert 8_000_000 <= peak <= 8_001_000


def words(folder):
    """A tokenizer of whole words, saved."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = ["[PAD]", "[UNK]", "good", "bad", "film", "plot", "actor", "scene"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]").save_pretrained(folder)
    return known[2:]


def bert(tmp_path):
    """Options for the sentiment task on two tiny layers and sixty sentences."""
    folder, data = tmp_path / "model", tmp_path / "mine.tsv"
    known = words(folder)
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    transformers.BertModel(config).save_pretrained(folder)
    rows = [f"{known[i % 2]} {known[2 + i % 4]} {known[2 + i % 3]}\t{i % 2}" for i in range(60)]
    data.write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    options = ["--model", str(folder), "--data", str(data), "--seeds", "1", "--steps", "3", "--batch-size", "8"]
    return [*options, "--threads", "1", "--rounds", "1", "--no-plots", "--out", str(tmp_path / "out")]


@needs_transformers
def test_every_method_on_a_bert(tmp_path):
    """The sentiment task with a model and a file of one's own: every method trains, as many weights as it says."""
    pytest.importorskip("peft", reason="two of the methods are PEFT's")
    assert main([*bert(tmp_path), "--methods", ",".join(METHODS)]) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    trained = {key.partition(" ")[0]: run["trainable"] for key, run in found["runs"].items()}
    low_rank = 8 * 2 * (4 * (32 + 32) + 2 * (32 + 48)) + 66
    assert trained["lora"] == trained["qlora"] == trained["sparse"] == trained["pruned"] == low_rank
    assert trained["peft-lora"] == trained["peft-lora-accelerated"] == low_rank
    assert trained["head"] == 2 * 32 + 2 and trained["prompt"] == 20 * 32 + 66
    assert trained["prefix"] == 20 * 2 * 2 * 32 + 66 and trained["none"] == 0
    assert found["settings"]["head"] == ["classifier"]
    memory = found["costs"]["memory"]
    assert memory["qlora"]["weights"] < memory["lora"]["weights"] and memory["head"]["kept"] < memory["lora"]["kept"]
    assert all(each["peak"] >= each["weights"] + each["kept"] for each in memory.values())
    assert found["runs"]["sparse | seed 0"]["about"].endswith("of the factors are zero")


@needs_transformers
def test_frozen_weights_in_bf16(tmp_path):
    """Half the bytes of frozen weights; what is trained stays in fp32."""
    options = [*bert(tmp_path), "--methods", "lora,prefix,adapter,head"]
    assert main(options) == 0
    there = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert main([*options[:-4], *options[-2:], "--dtype", "bfloat16", "--out", str(tmp_path / "half")]) == 0
    half = json.loads((tmp_path / "half" / "compare.json").read_text())
    assert half["settings"]["autocast"] and half["settings"]["dtype"] == "bfloat16"
    for name, full in there["costs"]["memory"].items():
        frozen = full["weights"] - 4 * full["trainable"]
        assert half["costs"]["memory"][name]["weights"] - 4 * full["trainable"] <= 0.6 * frozen
        assert half["costs"]["memory"][name]["trained"] == full["trained"]


@needs_transformers
def test_language_model(tmp_path):
    """A decoder: perplexity, lower is better; a prefix of real tokens starts near the model that it is put into."""
    folder, data = tmp_path / "model", tmp_path / "mine.txt"
    known = words(folder)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    data.write_text(" ".join(known * 60))
    options = ["--task", "language-model", "--model", str(folder), "--data", str(data), "--max-length", "16"]
    options += ["--methods", "none,lora,prompt,prefix", "--seeds", "1", "--steps", "12", "--batch-size", "2"]
    options += ["--threads", "1", "--rounds", "1", "--no-plots", "--out", str(tmp_path / "out")]
    assert main(options) == 0
    metric = {
        key: run["metric"] for key, run in json.loads((tmp_path / "out" / "compare.json").read_text())["runs"].items()
    }
    assert 8 < metric["none | seed 0"] < 32
    for name in ("lora", "prompt", "prefix"):
        assert metric[f"{name} | seed 0"] < metric["none | seed 0"]
