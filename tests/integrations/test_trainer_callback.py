"""`AccelerateCallback`: when it accelerates a trainer's model, what it says, and that the model trains as PEFT's does."""

from __future__ import annotations

import pickle
import sys
import warnings

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from peft import IA3Config, LoraConfig, get_peft_model

import fastpeft
from fastpeft.integrations.peft.kind import Accelerated
from peft_cases import lora_layers


def llama(config=None):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    return get_peft_model(model, config or LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def make(folder, *callbacks, model=None, **given):
    ids = torch.randint(32, (8, 6), generator=torch.Generator().manual_seed(1))
    settings = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    arguments = transformers.TrainingArguments(str(folder), **settings, disable_tqdm=True, use_cpu=True)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return transformers.Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks), **given)


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trains_as_plain_peft(tmp_path):
    told = []
    trainer = make(tmp_path, fastpeft.AccelerateCallback(report=told.append), model=llama())
    assert all(isinstance(layer, Accelerated) for layer in lora_layers(trainer.model)), "before train"
    assert [len(report.accelerated) for report in told] == [7]
    found, plain = losses(trainer), losses(make(tmp_path, model=llama()))
    assert len(found) == 4 and found[0] != found[-1]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=1e-4, atol=0)
    assert fastpeft.status(trainer).served == 28 and len(told) == 1, "nothing is told twice"


def test_what_comes_after_the_trainer_is_made(tmp_path):
    """A model that ``model_init`` makes anew, and an adapter on further layers."""
    trainer = make(tmp_path, fastpeft.AccelerateCallback, model_init=llama)
    trainer.train()
    assert fastpeft.status(trainer).served == 28
    told = []
    model = llama(LoraConfig(target_modules=["q_proj"]))
    trainer = make(tmp_path, fastpeft.AccelerateCallback(report=told.append), model=model)
    model.add_adapter("late", LoraConfig(target_modules="all-linear"))
    model.set_adapter("late")
    trainer.train()
    assert [report.changed for report in told] == [1, 6] and fastpeft.status(trainer).served == 28


def test_a_line_after_the_trainer(tmp_path):
    """What the callback's documentation says does the same."""
    trainer = make(tmp_path, model=llama())
    assert fastpeft.accelerate(trainer).changed == 7
    trainer.train()
    assert fastpeft.status(trainer).served == 28


def test_nothing_to_accelerate_is_said(tmp_path):
    model = llama(IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fastpeft")
        trainer = make(tmp_path, fastpeft.AccelerateCallback(), model=model)
    with pytest.warns(UserWarning, match="0 of 1 PEFT layers accelerated"):
        trainer.train()


def test_a_callback_as_others_are():
    callback = fastpeft.AccelerateCallback(report=print)
    assert isinstance(callback, transformers.TrainerCallback) and isinstance(callback, fastpeft.AccelerateCallback)
    again = pickle.loads(pickle.dumps(callback))
    assert type(again) is type(callback) and again._told is print

    class Mine(fastpeft.AccelerateCallback):
        """A user's own."""

    assert isinstance(Mine(), transformers.TrainerCallback) and isinstance(Mine(), Mine)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)

    class Other(fastpeft.AccelerateCallback):
        """None that has been made before."""

    with pytest.raises(ImportError, match=r"^Other: transformers must be installed, got "):
        Other()
