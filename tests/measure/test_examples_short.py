"""The examples to copy: thirty lines at most, each runs as it stands, trains, and leaves nothing to PEFT's forward."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpeft

FOLDER = Path(__file__).parents[2] / "examples"
NEEDS = {
    "peft_model": ["peft", "transformers"],
    "trainer": ["peft", "transformers", "accelerate"],
    "sft_trainer": ["peft", "transformers", "trl", "datasets"],
    "qlora": ["peft", "transformers", "bitsandbytes", "accelerate"],
    "own_model": [],
    "multi_task": [],
    "accelerate_loop": ["peft", "transformers", "accelerate"],
    "lightning_module": ["peft", "transformers", "lightning"],
}
PARALLEL = {"ddp": ["peft", "transformers"], "fsdp2": ["peft", "transformers"]}


def need(packages):
    for package in packages:
        pytest.importorskip(package, reason=f"the example needs {package}: pip install fastpeft[test]")


def test_every_example_is_short_and_run_here():
    files = {path.stem: path.read_text().splitlines() for path in FOLDER.glob("*.py")}
    assert files.keys() == NEEDS.keys() | PARALLEL.keys()
    assert {name: len(lines) for name, lines in files.items() if len(lines) > 30} == {}
    readme = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"`(\w+)\.py`", readme)) >= files.keys(), "examples/README.md has a line for each"


def losses(text):
    return [float(value) for value in re.findall(r"loss'?:? '?(\d+\.\d+)", text)]


@pytest.mark.parametrize("name", NEEDS)
def test_example(name, tmp_path, monkeypatch, capsys):
    need(NEEDS[name])
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    made = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    found = losses(capsys.readouterr().out)
    if name != "lightning_module":  # which prints none
        assert len(found) > 1 and min(found) < 0.98 * found[0], found
    if name == "own_model":
        assert (tmp_path / "demo_output" / "adapters.safetensors").stat().st_size > 8 * 12288 / 2
        assert any("lora_" in key for key in made["model"].state_dict())
        assert not any("lora_" in key for key in made["manager"].unload().state_dict())
    elif name == "multi_task":
        with fastpeft.task(0):
            assert "lora_adapter: M=96" in str(fastpeft.explain(made["model"], made["x"]))
    else:
        status = fastpeft.status(next(made[key] for key in ("trainer", "module", "model") if key in made))
        assert status.served >= 140 and not status.left and not status.others, status


def test_a_model_by_name(tmp_path, monkeypatch, capsys):
    """What the examples take as an argument goes to ``from_pretrained``."""
    need(NEEDS["peft_model"])
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["peft_model.py", str(tmp_path)])
    made = runpy.run_path(str(FOLDER / "peft_model.py"), run_name="__main__")
    assert made["base"].config.hidden_size == 16 and fastpeft.status(made["model"]).served == 70


@pytest.mark.parametrize("name", PARALLEL)
def test_two_processes(name, tmp_path):
    """Under torchrun, DDP with fastpeft's command between: the losses fall, and every call is served."""
    need(PARALLEL[name])
    between = ["-m", "fastpeft"] if name == "ddp" else []
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", *between, str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"rank (\d): loss (\S+), fastpeft: 140 calls served, 0 left to PEFT, in 14 layers", done.stdout)
    assert sorted(rank for rank, _ in said) == ["0", "1"], done.stdout
    assert all(float(loss) < 5.35 for _, loss in said), "log 256 is 5.55"
    assert done.stderr.count("fastpeft: adapters injected: 1, layers accelerated: 14") == len(between) // 2
