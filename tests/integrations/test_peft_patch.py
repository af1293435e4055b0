"""`patch`: every adapter that PEFT injects is accelerated, through each of its doors; `unpatch` leaves no trace."""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.util
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTuner

import fastpeft
from fastpeft.integrations.peft.kind import Accelerated
from peft_cases import TARGETS, Toy, batch, lora_layers, toy

module = importlib.import_module("fastpeft.integrations.peft.patch")
ORIGINAL = vars(BaseTuner)["inject_adapter"]
CONFIG = {"target_modules": TARGETS, "init_lora_weights": False}


@pytest.fixture(autouse=True)
def no_trace():
    torch.manual_seed(0)
    finders = list(sys.meta_path)
    yield
    fastpeft.unpatch()
    assert vars(BaseTuner)["inject_adapter"] is ORIGINAL and sys.meta_path == finders
    assert not module._patches and not module._hold


def llama():
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))


def fast(model):
    """How many layers are ours, all of them."""
    layers = lora_layers(model)
    assert layers and all(isinstance(layer, Accelerated) for layer in layers)
    return len(layers)


def by_from_pretrained(folder):
    return PeftModel.from_pretrained(Toy(), folder), 3


def by_from_pretrained_on_meta(folder):
    return PeftModel.from_pretrained(Toy(), folder, low_cpu_mem_usage=True), 3


def by_add_adapter(folder):
    model = get_peft_model(Toy(), LoraConfig(target_modules=["lin0"]))
    assert fast(model) == 1
    model.add_adapter("late", LoraConfig(**CONFIG))
    model.set_adapter("late")
    return model, 3


def by_load_adapter(folder):
    model = get_peft_model(Toy(), LoraConfig(target_modules=["lin0"]))
    model.load_adapter(folder, "late")
    model.set_adapter("late")
    return model, 3


def by_injection(folder):
    return inject_adapter_in_model(LoraConfig(**CONFIG), Toy()), 3


def by_mixed_model(folder):
    model = get_peft_model(Toy(), LoraConfig(**CONFIG), mixed=True)
    model.add_adapter("second", LoHaConfig(target_modules=["head"]))
    return model, 3


DOORS = {
    "get_peft_model": lambda folder: (get_peft_model(Toy(), LoraConfig(**CONFIG)), 3),
    "from_pretrained": by_from_pretrained,
    "from_pretrained_on_meta": by_from_pretrained_on_meta,
    "add_adapter": by_add_adapter,
    "load_adapter": by_load_adapter,
    "inject_adapter_in_model": by_injection,
    "mixed": by_mixed_model,
}


@pytest.mark.parametrize("door", DOORS)
def test_doors(door, tmp_path):
    """Every layer is ours, serves its calls, and gives what PEFT's own gives."""
    toy().save_pretrained(tmp_path)
    with warnings.catch_warnings(), fastpeft.patch() as patched:
        warnings.filterwarnings("error", "fastpeft|patch")
        model, count = DOORS[door](tmp_path)
    assert fast(model) == count == patched.changed and patched.injected == len(patched.reports) >= 1
    y = model.eval()(batch()["x"])
    assert fastpeft.status(model).served == count
    assert fastpeft.restore(model) == count
    torch.testing.assert_close(y, model(batch()["x"]))


def test_doors_of_transformers(tmp_path, monkeypatch):
    """``add_adapter`` and ``load_adapter`` of transformers' own models."""
    # transformers asks for a PEFT that is newer than what both methods need.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.20")
    targets = {"target_modules": ["q_proj", "v_proj"]}
    with fastpeft.patch() as patched:
        model = llama()
        model.add_adapter(LoraConfig(**targets), "first")
        assert fast(model) == 2
        get_peft_model(llama(), LoraConfig(**targets)).save_pretrained(tmp_path)
        other = llama()
        other.load_adapter(str(tmp_path), "late")
    assert fast(other) == 2 and patched.injected == 3
    other(torch.tensor([[1, 2]]))
    assert fastpeft.status(other).served == 2


def test_door_of_diffusers(tmp_path):
    """``load_lora_weights`` of a pipeline, and ``add_adapter`` of its model."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

    def pipeline():
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(4, 8), layers_per_block=1, sample_size=8, norm_num_groups=4, cross_attention_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        return diffusers.StableDiffusionPipeline(unet=unet, scheduler=diffusers.DDIMScheduler(), **others)

    pipe = pipeline()
    with fastpeft.patch():
        pipe.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
        layers = peft.get_peft_model_state_dict(pipe.unet)
        pipe.save_lora_weights(tmp_path, unet_lora_layers=layers)
        other = pipeline()
        other.load_lora_weights(str(tmp_path))
    later = pipeline()
    later.load_lora_weights(str(tmp_path))
    assert fastpeft.accelerate(later).changed == len(layers) // 2
    assert fast(pipe.unet) == fast(other.unet) == fast(later.unet) == len(layers) // 2
    other.unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, 8))
    assert fastpeft.status(other).served == len(layers) // 2


def test_with_ends_with_its_block_and_unpatch_ends_the_rest():
    fastpeft.patch()
    again = fastpeft.patch()
    with fastpeft.patch() as outer, fastpeft.patch() as inner:
        model = get_peft_model(Toy(), LoraConfig(**CONFIG))
        assert fastpeft.unpatch() == 2 and not again.active
        assert outer.active and inner.active, "a block's own is not for unpatch"
        model.add_adapter("second", LoraConfig(**CONFIG))
    assert vars(BaseTuner)["inject_adapter"] is ORIGINAL
    assert [each.injected for each in (again, outer, inner)] == [1, 2, 2]
    assert [each.changed for each in (again, outer, inner)] == [3, 3, 3], "layers that are ours already are not new"
    assert {type(layer) for layer in lora_layers(get_peft_model(Toy(), LoraConfig(**CONFIG)))} == {PeftLinear}
    assert fast(model) == 3, "what was accelerated stays so"
    with pytest.raises(ZeroDivisionError), fastpeft.patch():
        raise ZeroDivisionError
    assert vars(BaseTuner)["inject_adapter"] is ORIGINAL and fastpeft.unpatch() == 0


def test_reports():
    told = []
    with fastpeft.patch(report=told.append) as patched:
        get_peft_model(Toy(), LoraConfig(**CONFIG))
        get_peft_model(Toy(), LoraConfig(**CONFIG, use_dora=True))
    assert [len(report.accelerated) for report in told] == [3, 0] and list(patched.reports) == told
    assert str(patched).startswith("fastpeft: adapters injected: 2, layers accelerated: 6")
    (why,) = patched.left
    assert patched.left[why] == 3 and f"      3  left to PEFT: {why}" in str(patched) and "Dora" in why


def test_a_model_is_not_kept():
    with fastpeft.patch() as patched:
        gone = weakref.ref(get_peft_model(Toy(), LoraConfig(**CONFIG)))
        gc.collect()
    assert gone() is None and patched.injected == 1


@pytest.mark.parametrize("config", [IA3Config(target_modules=["lin0"], feedforward_modules=[]),
                                    AdaLoraConfig(target_modules=["lin0"], total_step=10)], ids=lambda c: c.peft_type)  # fmt: skip
def test_what_is_left_alone_is_said(config):
    with fastpeft.patch(), pytest.warns(UserWarning, match="0 of 1 PEFT layers accelerated"):
        get_peft_model(Toy(), copy.deepcopy(config))


def test_reasons_for_later_are_said_where_no_report_was(tmp_path):
    """An adapter that is not active when it is injected is no news; a call that is left for another reason is."""
    with warnings.catch_warnings(), fastpeft.patch():
        warnings.filterwarnings("error", "fastpeft|patch")
        model = get_peft_model(Toy(), LoraConfig(target_modules=["lin0"]))
        model.add_adapter("late", LoraConfig(**CONFIG))
    assert list(fastpeft.accelerate(model).skipped.values()) == ["no active adapter"] * 2


def test_an_error_of_ours_is_said_and_leaves_peft(monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("a slip")

    monkeypatch.setattr(module, "accelerated", failing)
    told = []
    with fastpeft.patch(report=told.append), pytest.warns(RuntimeWarning, match="PEFT's own.* RuntimeError: a slip"):
        model = get_peft_model(Toy(), LoraConfig(**CONFIG))
    assert {type(layer) for layer in lora_layers(model)} == {PeftLinear}
    assert "RuntimeError: a slip" in str(told[0])


def test_an_error_of_pefts_passes():
    with fastpeft.patch() as patched, pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(Toy(), LoraConfig(target_modules=["no_such"]))
    assert patched.injected == 0


def test_a_method_that_others_replace_too():
    """Theirs stays, and ours under it does nothing more; a later patch is in force once."""
    handle = fastpeft.patch()
    ours = BaseTuner.inject_adapter

    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    BaseTuner.inject_adapter = theirs
    try:
        assert fastpeft.unpatch() == 1 and BaseTuner.inject_adapter is theirs
        model = get_peft_model(Toy(), LoraConfig(**CONFIG))
        assert {type(layer) for layer in lora_layers(model)} == {PeftLinear} and handle.injected == 0
        with fastpeft.patch() as patched:
            assert fast(get_peft_model(Toy(), LoraConfig(**CONFIG))) == 3 and patched.injected == 1
        assert BaseTuner.inject_adapter is theirs
    finally:
        BaseTuner.inject_adapter = ORIGINAL


def test_threads():
    """Blocks that overlap in threads: PEFT is patched while one is open, and its own again after the last."""
    found = []

    def work():
        for _ in range(5):
            with fastpeft.patch():
                found.append(fast(get_peft_model(Toy(), LoraConfig(**CONFIG))))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3] * 20 and vars(BaseTuner)["inject_adapter"] is ORIGINAL


LATE = """
import sys, fastpeft
finders = list(sys.meta_path)
with fastpeft.patch():
    assert sys.meta_path != finders
assert sys.meta_path == finders
fastpeft.patch(), fastpeft.patch()
assert not {"peft", "transformers"} & set(sys.modules), "patch imports neither"
import peft, torch
from peft.tuners import tuners_utils
assert tuners_utils.__loader__ is tuners_utils.__spec__.loader
assert type(tuners_utils.__loader__).__module__ == "_frozen_importlib_external"
assert not [finder for finder in sys.meta_path if "fastpeft" in type(finder).__module__]
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
assert len(fastpeft.status(model).layers) == 1
assert fastpeft.unpatch() == 2 and not hasattr(tuners_utils.BaseTuner.inject_adapter, "__wrapped__")
"""


def test_before_peft_is_imported():
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_peft(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="peft must be installed"), fastpeft.patch():
        pass


def test_a_peft_without_the_method(monkeypatch):
    monkeypatch.setattr(module, "_METHOD", "put_adapter")
    with pytest.warns(UserWarning, match=r"peft must have BaseTuner\.put_adapter, got none in version"):
        fastpeft.patch()
