"""The manager's files: what comes back, what is refused, and that nothing changes then."""

import copy
import json
import os
import pickle
import sys

import pytest
import torch
from torch import nn

from fastpeft import EfficientFineTuningManager, share_lora
from manager_cases import Small, assert_same, encoder, picture, train

FORMATS = ["adapters.safetensors", "adapters.pt"]


def adapted(model, seed=0):
    torch.manual_seed(seed)
    manager = EfficientFineTuningManager(model).apply_lora(rank=2, bias=True, modules_to_save="head")
    return train(manager.apply_adalora("b", rank=3).apply_sparse_lora("a", rank=3, pattern="2:4"))


def content(path):
    """(tensors, about) of a file."""
    if path.suffix == ".pt":
        archive = torch.load(path, weights_only=True)
        return archive["tensors"], json.loads(archive["fastpeft"])
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["fastpeft"])  # noqa: SIM118


def rewrite(path, tensors=None, about=None):
    old = content(path)
    torch.save({"tensors": old[0] if tensors is None else tensors, "fastpeft": json.dumps(about or old[1])}, path)


@pytest.mark.parametrize("file", FORMATS)
def test_round_trip(file, tmp_path):
    model, x, path = Small().eval(), torch.randn(4, 8), tmp_path / file
    base = copy.deepcopy(model)
    manager = adapted(model)
    want = model(x)
    manager.save_efficient_weights(path)
    assert os.listdir(tmp_path) == [file]
    names = content(path)[0]
    assert "lora/body.a/lora_A" in names and "adalora/body.b/rank_importance" in names and "/head/weight" in names
    assert not any(name.endswith("body.a/weight") for name in names)
    # into adapters like these, whose Parameters stay: an optimizer's
    twin = copy.deepcopy(base)
    other = adapted(twin, seed=1)
    held = [id(p) for p in other.get_trainable_parameters()]
    assert (twin.eval()(x) - want).abs().max() > 1e-2
    other.load_efficient_weights(str(path))
    assert torch.equal(twin(x), want) and [id(p) for p in other.get_trainable_parameters()] == held
    # into a manager that has none
    fresh = copy.deepcopy(base)
    last = EfficientFineTuningManager(fresh)
    last.load_efficient_weights(path)
    assert torch.equal(fresh(x), want) and list(last.methods) == ["lora", "adalora", "sparse_lora"]
    assert last.count_trainable_parameters() == manager.count_trainable_parameters()
    last.apply_lora("b", rank=2)  # it goes on as any


@pytest.mark.parametrize("file", FORMATS)
def test_merged_is_saved_unmerged_and_unmerged_by_a_load(file, tmp_path):
    model, x, path = Small().eval(), torch.randn(4, 8), tmp_path / file
    manager = adapted(model)
    want = model(x)
    manager.merge()
    manager.save_efficient_weights(path)
    train(manager)
    manager.load_efficient_weights(path)
    assert torch.equal(model(x), want)


def test_attention_and_recurrent(tmp_path):
    path, x = tmp_path / "a.pt", torch.randn(2, 3, 16)
    model = encoder().eval()
    base = copy.deepcopy(model)
    manager = EfficientFineTuningManager(model).apply_lora("self_attn", rank=2).apply_adapter("linear2")
    train(manager.apply_adalora("layers.0.self_attn.out_proj", rank=2)).save_efficient_weights(path)
    assert "lora/layers.0.self_attn/in_proj.lora_A" in content(path)[0]
    fresh = EfficientFineTuningManager(base)
    fresh.load_efficient_weights(path)
    assert torch.equal(base(x), model(x))
    lstm = nn.ModuleDict({"lstm": nn.LSTM(16, 4)})
    twin = copy.deepcopy(lstm)
    train(EfficientFineTuningManager(lstm).apply_lora("lstm", rank=2)).save_efficient_weights(path)
    EfficientFineTuningManager(twin).load_efficient_weights(path)
    assert torch.equal(lstm.eval()["lstm"](x)[0], twin.eval()["lstm"](x)[0])


def square():
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])


@pytest.mark.parametrize("receiver", ["shared", "apart", "fresh"])
@pytest.mark.parametrize("file", FORMATS)
def test_a_shared_adapter_is_in_the_file_once_and_shared_after_a_load(file, receiver, tmp_path):
    path, model = tmp_path / file, square()
    base = copy.deepcopy(model)
    manager = EfficientFineTuningManager(model).apply_lora(["0", "1", "2"], rank=2, dropout_probability=0.0)
    share_lora([model[0], model[2]])
    train(manager).save_efficient_weights(path)
    assert sorted(content(path)[0]) == ["lora/0/lora_A", "lora/0/lora_B", "lora/1/lora_A", "lora/1/lora_B"]
    other = EfficientFineTuningManager(base)
    if receiver != "fresh":
        other.apply_lora(["0", "1", "2"], rank=2, dropout_probability=0.0)
    if receiver == "shared":
        share_lora([base[0], base[2]])
    other.load_efficient_weights(path)
    assert base[0].lora_A is base[2].lora_A and base[0].lora_A is not base[1].lora_A
    assert other.count_trainable_parameters() == 64 == manager.count_trainable_parameters()
    twin = copy.deepcopy(base)
    assert twin[0].lora_A is twin[2].lora_A
    x = torch.randn(2, 8)
    assert torch.equal(base(x), model(x))


def test_adapters_that_are_shared_here_and_apart_in_the_file_are_refused(tmp_path):
    path, model = tmp_path / "a.pt", square()
    manager = EfficientFineTuningManager(model).apply_lora(["0", "1"], rank=2)
    manager.save_efficient_weights(path)
    share_lora([model[0], model[1]])
    before = picture(model)
    with pytest.raises(ValueError, match="lora/1/lora_A must be shared with lora/0/lora_A in the file"):
        manager.load_efficient_weights(path)
    assert_same(before, picture(model))


def test_compacted_ranks_and_float_masks(tmp_path):
    path, x = tmp_path / "a.safetensors", torch.randn(4, 8)
    model = Small().eval()
    base = copy.deepcopy(model)
    manager = train(EfficientFineTuningManager(model).apply_adalora("b", rank=6).apply_pruning_lora("a", rank=4))
    layer = manager.adalora_layers["body.b"]
    with torch.no_grad():
        layer.rank_importance.copy_(torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 0.5]))
    assert layer.compact() == 3
    manager.entries[1].module.prune(0.5)
    manager.save_efficient_weights(path)
    twin = copy.deepcopy(base)
    other = EfficientFineTuningManager(twin)
    other.load_efficient_weights(path)
    assert other.adalora_layers["body.b"].rank == 3
    assert torch.equal(twin(x), model(x))
    assert torch.equal(other.entries[1].module.mask_A, manager.entries[1].module.mask_A)
    # the documents' masks, floats of the factors' shapes
    pt = tmp_path / "a.pt"
    manager.save_efficient_weights(pt)
    tensors = content(pt)[0]
    module = manager.entries[1].module
    tensors |= {f"pruning_lora/body.a/mask_{n}": getattr(module, f"mask_{n}").float() for n in "AB"}
    rewrite(pt, tensors)
    train(other).load_efficient_weights(pt)
    assert torch.equal(twin(x), model(x))


def test_four_bits(tmp_path):
    path, x, model = tmp_path / "a.safetensors", torch.randn(4, 8), Small().eval()
    base = copy.deepcopy(model)
    manager = EfficientFineTuningManager(model).apply_qlora(rank=2, quant_type="fp4", compute_dtype=torch.float32)
    train(manager).save_efficient_weights(path)
    assert sorted({name.rpartition("/")[2] for name in content(path)[0]}) == ["lora_A", "lora_B"]
    other = EfficientFineTuningManager(base)
    other.load_efficient_weights(path)
    assert torch.equal(base(x), model(x)) and base.body["a"].quant_type == "fp4"


def test_prompts_whole_and_baked(tmp_path):
    path = tmp_path / "a.safetensors"
    manager = EfficientFineTuningManager(encoder()).apply_ptuning(4).apply_prefix_tuning(prefix_length=3)
    train(manager).save_efficient_weights(path)
    other = EfficientFineTuningManager(encoder())
    other.load_efficient_weights(path)
    assert torch.equal(other.ptuning_embeddings.encode(), manager.ptuning_embeddings.encode())
    assert torch.equal(other.prefix_tuning.encode(), manager.prefix_tuning.encode())
    manager.ptuning_embeddings.bake()
    manager.save_efficient_weights(path)
    again = EfficientFineTuningManager(encoder())
    again.load_efficient_weights(path)
    assert again.ptuning_embeddings.baked
    assert torch.equal(again.ptuning_embeddings.encode(), manager.ptuning_embeddings.encode())


def test_a_combined_adapter_of_mixed_ranks_comes_back(tmp_path):
    path, x, model = tmp_path / "a.pt", torch.randn(4, 8), Small().eval()
    base = copy.deepcopy(model)
    manager = EfficientFineTuningManager(model).apply_lora(rank=2, adapter_name="one")
    train(manager.apply_lora("b", rank=3, adapter_name="two")).combine(["one", "two"])
    manager.delete("one")
    manager.delete("two")
    manager.save_efficient_weights(path)
    EfficientFineTuningManager(base).load_efficient_weights(path)
    torch.testing.assert_close(base(x), model(x))


def without(tensors):
    return {name: value for name, value in tensors.items() if name != "lora/body.a/lora_B"}


WRONG = {
    "missing": (lambda t: without(t), None, "hold the tensors of the adapter at lora/body.a/, got .'lora_B'. missing"),
    "unknown": (lambda t: t | {"x/y/z": torch.ones(1)}, None, "hold the tensors of these adapters, got .'x/y/z'."),
    "shape": (lambda t: t | {"lora/body.a/lora_A": torch.ones(3, 8)}, None, "must fit the adapter at lora/body.a/"),
    "nan": (lambda t: t | {"lora/body.a/lora_A": torch.full((2, 8), torch.nan)}, None, "lora_A must be finite"),
    "overflow": (
        lambda t: t | {"lora/body.a/lora_A": torch.full((2, 8), 1e39, dtype=torch.float64)},
        None,
        "be finite",
    ),
    "dtype": (
        lambda t: t | {"lora/body.a/lora_A": torch.ones(2, 8, dtype=torch.int64)},
        None,
        "must have a dtype like",
    ),
    "head": (lambda t: t | {"/head/weight": torch.ones(2, 2)}, None, "must fit the adapter at /head/"),
    "mask": (lambda t: t | {"sparse_lora/body.a/mask_A": torch.ones(5)}, None, "must fit the adapter at sparse_lora/"),
    "version": (None, lambda a: a | {"version": 2}, "be of version 1 of this format, got 2"),
    "no adapters": (None, lambda a: a | {"adapters": 3}, "say which adapters it holds"),
    "other": (None, lambda a: a | {"adapters": a["adapters"][:2]}, "hold the adapters"),
    "method": (
        None,
        lambda a: a | {"adapters": [{**each, "method": "lora"} for each in a["adapters"]]},
        "hold the adapters",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_nothing_is_changed_by_a_file_that_does_not_fit(wrong, tmp_path):
    path, model = tmp_path / "a.pt", Small()
    manager = adapted(model)
    manager.save_efficient_weights(path)
    tensors, about, text = WRONG[wrong]
    old = content(path)
    rewrite(path, tensors and tensors(old[0]), about and about(old[1]))
    train(manager)
    before = picture(model)
    with pytest.raises((ValueError, TypeError), match=text):
        manager.load_efficient_weights(path)
    assert_same(before, picture(model))


@pytest.mark.parametrize("wrong", ["missing", "shape", "nan", "no adapters"])
def test_nor_by_one_that_a_fresh_manager_cannot_load(wrong, tmp_path):
    path, base = tmp_path / "a.pt", Small()
    manager = EfficientFineTuningManager(copy.deepcopy(base)).apply_lora(
        "a", rank=2, modules_to_save="head", init="pissa"
    )
    manager.apply_qlora("b", rank=2).save_efficient_weights(path)
    tensors, about, _ = WRONG[wrong]
    old = content(path)
    rewrite(path, tensors and tensors(old[0]), about and about(old[1]))
    before, other = picture(base), EfficientFineTuningManager(base)
    with pytest.raises(ValueError, match="load_efficient_weights"):
        other.load_efficient_weights(path)
    assert_same(before, picture(base))
    assert other.methods == {} and other.saved_modules == {}


def test_a_record_that_cannot_be_applied(tmp_path):
    path, base = tmp_path / "a.pt", Small()
    model = copy.deepcopy(base)
    manager = EfficientFineTuningManager(model).apply_pruning_lora(rank=2, schedule=lambda step: 0.1 * step)
    train(manager).save_efficient_weights(path)
    before = picture(base)
    with pytest.raises(ValueError, match="options must be given with apply_pruning_lora before loading"):
        EfficientFineTuningManager(base).load_efficient_weights(path)
    about = content(path)[1]
    for change in ({"method": "wizardry"}, {"paths": ["elsewhere"]}, {"options": {"rank": 1, "magic": 2}}):
        rewrite(path, about=about | {"adapters": [about["adapters"][0] | {"options": {"rank": 2}} | change]})
        with pytest.raises((ValueError, TypeError)):
            EfficientFineTuningManager(base).load_efficient_weights(path)
    assert_same(before, picture(base))
    manager.save_efficient_weights(path)
    other = EfficientFineTuningManager(base).apply_pruning_lora(rank=2, schedule=lambda step: 0.1 * step)
    other.load_efficient_weights(path)
    x = torch.randn(4, 8)
    assert torch.equal(base.eval()(x), model.eval()(x))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("file", ["a.pt", "a.bin", "a.safetensors", "a"])
def test_foreign_and_damaged_files(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, manager = tmp_path / file, adapted(Small())
    with pytest.raises(FileNotFoundError, match="path must be a file"):
        manager.load_efficient_weights(path)
    manager.save_efficient_weights(path)
    whole = path.read_bytes()
    before = picture(manager.model)
    for data in (b"", b"text", whole[:-7], whole[: len(whole) // 2], pickle.dumps(Evil())):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="be a file that save_efficient_weights wrote"):
            manager.load_efficient_weights(path)
    torch.save({"tensors": Evil(), "fastpeft": "{}"}, path)
    with pytest.raises(ValueError, match="be a file that"):
        manager.load_efficient_weights(path)
    assert not (tmp_path / "evil").exists()
    assert_same(before, picture(manager.model))


@pytest.mark.parametrize("file", FORMATS)
def test_a_write_that_fails_leaves_the_old_file(file, tmp_path, monkeypatch):
    path, manager = tmp_path / file, adapted(Small())
    manager.save_efficient_weights(path)
    old = path.read_bytes()
    train(manager)

    def fails(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        manager.save_efficient_weights(path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == [file]


def test_without_safetensors(tmp_path, monkeypatch):
    manager = adapted(Small())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install fastpeft\[files\]"):
        manager.save_efficient_weights(tmp_path / "a.safetensors")
    manager.save_efficient_weights(tmp_path / "a.pt")
    manager.load_efficient_weights(tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["a.pt"]


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="model must have adapters, got none"):
        EfficientFineTuningManager(Small()).save_efficient_weights(tmp_path / "a.pt")
