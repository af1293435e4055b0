"""Each experiment's --quick: frozen weights keep every bit, disabling gives back what was, counts are true, files load."""

import json

import pytest
import torch

for needed in ("rich", "matplotlib", "sklearn", "transformers", "tokenizers"):
    pytest.importorskip(needed)

import _experiment
import digits
import fusion
import images
import language_model
import run_all
import sentiment
import speech
import workflow
from fastpeft.cli import assets


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing may be fetched, and one thread is enough."""

    def fetch(package, cache=None):
        raise AssertionError(f"{package.name} must not be fetched")

    monkeypatch.setattr(assets, "fetch", fetch)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def result(experiment, folder, *arguments):
    """The experiment's result.json; the plot lies beside it."""
    command = ["--quick", "--threads", "1", "--output", str(folder), *arguments]
    assert _experiment.run(experiment, command) == 0
    where = folder / experiment.__name__
    assert (where / "result.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((where / "result.json").read_text())


def test_digits(tmp_path):
    got = result(digits.digits, tmp_path)
    assert got["identity_at_init"] and got["disabled_logits_bit_equal"]
    assert got["errors"]["off"] == got["errors"]["before"] != got["errors"]["on"]
    assert got["worst_digit"] == max(range(10), key=got["errors"]["before"].__getitem__)
    for name in ("on", "mixed"):
        assert got["errors"][name][got["worst_digit"]] < got["errors"]["before"][got["worst_digit"]]
    assert got["total"]["mixed"] < got["total"]["on"]
    plain = 64 * 64 + 64 + 64 * 128 + 128 + 128 * 10 + 10
    added = (64 + 64) + (64 + 128) + (128 + 10)
    assert (got["trainable"], got["parameters"], got["frozen_values_bit_equal"]) == (added, plain + added, plain)
    assert got["merged_errors_equal"]


def test_sentiment(tmp_path):
    """Every method; those of the manager are saved and loaded into a fresh model."""
    rows = result(sentiment.sentiment, tmp_path, "--method", "all")["methods"]
    assert rows.keys() == {*sentiment.METHODS, "pattern"}
    head, hidden, layers = 2 * 32 + 2, 32, 2
    trained = {
        "head": head,
        "lora": head + layers * 2 * 8 * 2 * hidden,
        "prompt": head + 20 * hidden,
        "prefix": head + 20 * layers * 2 * hidden,
        "adapter": head + layers * 2 * (2 * 24 * hidden + 24 + hidden),
        "pruned": head + layers * 2 * 16 * 2 * hidden,
    }
    for name, count in trained.items():
        assert rows[name]["trainable"] == count, name
    assert rows["pruned"]["trainable_after"] == head + layers * 2 * 8 * 2 * hidden
    assert rows["adalora"]["trainable_after"] < rows["adalora"]["trainable"]
    body = rows["head"]["frozen_values_bit_equal"]
    for name, row in rows.items():
        assert row.get("loaded_again_bit_equal", True), name
        assert row["frozen_values_bit_equal"] == body or name == "pattern", name
        assert len(row["losses"]) == (16 if name == "pattern" else 4)


def test_sentiment_keeps_what_was_run_before(tmp_path):
    result(sentiment.sentiment, tmp_path, "--method", "head")
    assert result(sentiment.sentiment, tmp_path, "--method", "prompt")["methods"].keys() == {"head", "prompt"}


def test_language_model(tmp_path):
    rows = result(language_model.language_model, tmp_path, "--method", "all")["methods"]
    assert rows.keys() == language_model.METHODS.keys()
    hidden, layers, keys, tokens = 32, 2, 2 * 8, language_model.P
    assert rows["prompt"]["trainable"] == tokens * hidden
    assert rows["prefix"]["trainable"] == rows["p-tuning-v2"]["trainable"] == tokens * layers * 2 * keys
    for name, row in rows.items():
        assert row["disabled_logits_bit_equal"], name
        assert row["frozen_values_bit_equal"] == row["parameters"] - row["trainable"], name
    for name in ("p-tuning-mlp", "p-tuning-lstm"):
        assert rows[name]["trainable_after"] == tokens * hidden < rows[name]["trainable"]
        assert rows[name]["baked_largest_difference"] < 1e-5
    assert rows["lora"]["loss_start"] == pytest.approx(rows["lora"]["loss_frozen"], abs=1e-6)


def test_fusion(tmp_path):
    got = result(fusion.fusion, tmp_path)
    head, hidden, layers, bottleneck = 2 * 32 + 2, 32, 2, fusion.BOTTLENECK
    adapter = layers * (2 * bottleneck * hidden + bottleneck + hidden)
    trained = {
        "movies": head + adapter,
        "head": head,
        "adapter": head + adapter,
        "fusion": head + layers * 3 * hidden**2,
    }
    assert {name: got["methods"][name]["trainable"] for name in trained} == trained
    assert got["adapters_bit_equal_in_stage_two"]
    body = got["methods"]["head"]["frozen_values_bit_equal"]
    assert got["methods"]["fusion"]["frozen_values_bit_equal"] == body + 3 * adapter
    assert [sum(place) for place in got["listened"]] == pytest.approx([1] * layers)


def test_images(tmp_path):
    rows = result(images.images, tmp_path, "--methods", "head", "lora", "depthwise")["methods"]
    assert rows["head"]["trainable"] == 64 * 10 + 10
    assert rows["head"]["trainable"] < rows["lora"]["trainable"] < rows["depthwise"]["trainable"]
    for name in ("lora", "depthwise"):
        assert rows[name]["disabled_logits_bit_equal"]
        assert rows[name]["merged_largest_relative_difference"] < 1e-4
        # Beside the body, frozen, its averages are held.
        assert rows[name]["frozen_values_bit_equal"] > rows[name]["parameters"] - rows[name]["trainable"]


def test_speech(tmp_path):
    rows = result(speech.speech, tmp_path)["methods"]
    hidden, head = 16, 9 * 16 + 9
    assert rows["head"]["trainable"] == head
    assert rows["lora"]["trainable"] == head + 4 * (12 + 4 * hidden) + 4 * (hidden + 4 * hidden)
    assert rows["lora"]["frozen_values_bit_equal"] == 4 * hidden * (12 + hidden + 2)
    assert rows["lora"]["disabled_logits_bit_equal"] and rows["lora"]["merged_largest_difference"] < 1e-5


def test_workflow(tmp_path):
    got = result(workflow.workflow, tmp_path)
    saved, mixed, shared, whole = (got[name] for name in ("checkpointing", "mixed_precision", "sharing", "together"))
    assert saved["kept_bytes_checkpointed"] < saved["kept_bytes"] / 2 and saved["gradient_difference"] < 1e-5
    assert 0 < mixed["gradient_difference_bf16"] < 0.05 and 0 < mixed["gradient_difference_fp16"] < 0.01
    assert mixed["adapters_stay_fp32"]
    head, one = 2 * 32 + 2, 8 * 2 * 32
    assert (shared["trainable"], shared["trainable_shared"], shared["tied"]) == (head + 4 * one, head + one, True)
    assert whole["loaded_again_bit_equal"] and whole["shared_after_load"] and whole["trainable"] == head + one
    assert whole["frozen_values_bit_equal"] == got["together"]["frozen_values_bit_equal"] > 0
    assert [(row["rank"], row["trainable"]) for row in got["sweep"]] == [
        (r, head + 4 * r * 64) for r in (2, 8) for _ in "abc"
    ]


def test_the_table_of_all(tmp_path, monkeypatch):
    """A command that has run is in the table with its time; --missing leaves it; the README keeps what is around."""
    calls = []

    def here(command, arguments):
        calls.append(command.name)
        experiment = {"digits.py": digits.digits, "speech.py": speech.speech}[command.script]
        assert _experiment.run(experiment, [*command.arguments, *arguments]) == 0
        return {"seconds": 12.3, "cpu_seconds": 20.4}

    monkeypatch.setattr(run_all, "timed", here)
    out = tmp_path / "out"
    ours = ["--output", str(out), "--", "--quick", "--threads", "1"]
    assert run_all.main(["--only", "digits", *ours]) == 0
    assert run_all.main(["--only", "digits", "speech", "--missing", *ours]) == 0
    assert calls == ["digits", "speech"]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{run_all.BEGIN}\nold\n{run_all.END}\nafter\n")
    run_all.write(out, readme, tmp_path / "plots")
    text = readme.read_text()
    assert text.startswith(f"before\n{run_all.BEGIN}\n|") and text.endswith(
        f"![speech](plots/speech.png)\n{run_all.END}\nafter\n"
    )
    assert "| `digits.py` | digit" in text and "12 s, 20 s" in text and "old" not in text
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == ["digits.png", "speech.png"]
    readme.write_text("no marks\n")
    with pytest.raises(ValueError, match="must hold the line"):
        run_all.write(out, readme, tmp_path / "plots")


def test_every_command_is_one_of_its_script():
    """What run_all starts, the scripts take."""
    for command in run_all.COMMANDS:
        methods = {"sentiment.py": [*sentiment.METHODS, "pattern"], "language_model.py": list(language_model.METHODS)}
        assert command.arguments == () or command.arguments[1] in methods[command.script]
    assert len({command.name for command in run_all.COMMANDS}) == len(run_all.COMMANDS) == 5 + 11 + 7


def test_frozen_tells_of_a_change():
    layer = torch.nn.Linear(2, 2).requires_grad_(False)
    frozen = _experiment.Frozen(layer)
    assert frozen.check() == 6
    with torch.no_grad():
        layer.weight[0, 0] += 1e-6
    with pytest.raises(RuntimeError, match=r"must keep every bit, got others in \['weight'\]"):
        frozen.check()


def test_what_cannot_be_fetched_is_a_message(capsys):
    def experiment(arguments):
        raise assets.AssetError("fetch: a thing must be downloadable")

    assert _experiment.run(experiment) == 1
    assert capsys.readouterr().err == "fetch: a thing must be downloadable\n"
