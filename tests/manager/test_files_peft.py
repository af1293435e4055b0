"""PEFT's folders: ours → file → PEFT, in a process without fastpeft → file → ours, equal tensors and outputs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpeft import (
    EfficientFineTuningManager,
    LoRALayer,
    LoRALinear,
    PrefixEncoder,
    PrefixTuning,
    PromptEmbedding,
    PromptEncoder,
    SparseLoRALinear,
    insert_prefix,
    insert_prompt,
    load_adapter,
    save_adapter,
)
from files_cases import build, output
from manager_cases import assert_same, picture, train

pytest.importorskip("peft", reason="the folders are PEFT's")
from safetensors.torch import load_file, save_file

SUPPORT = Path(__file__).parents[1] / "support"


def manager_of(name, **options):
    return EfficientFineTuningManager(build(name, **options))


def patterns():
    """Hand-made modules, each of a rank, a scaling and a layout of its own; a bias on one."""
    model = build("small")
    model.body["a"] = LoRALinear.from_linear(model.body["a"], rank=2, alpha=5, dropout=0.0, bias=True)
    model.body["b"] = SparseLoRALinear.from_linear(model.body["b"], rank=3, layout="in_out", scaling=0.01, dropout=0.0)
    model.head = LoRALinear(model.head, rank=3, alpha=3, dropout=0.0)
    return train(EfficientFineTuningManager(model)).model


def second():
    """The second adapter of two, behind another one on the same layers."""
    manager = manager_of("small").apply_lora(["a", "b"], rank=2, adapter_name="one")
    train(manager.apply_lora(["b"], rank=3, adapter_name="two")).switch("two")
    return manager


def compacted():
    manager = train(manager_of("small").apply_adalora(["a", "b"], rank=4, form="svd"))
    with torch.no_grad():
        manager.adalora_layers["body.a"].lora_E[1] = 0.0
    manager.adalora_layers["body.a"].compact()
    return manager


def nested():
    """Ranks and scalings by expressions, and a target that only one can name."""
    model = build("nested").requires_grad_(False)
    model.a = LoRALinear.from_linear(model.a, rank=2, alpha=3, dropout=0.0)
    model.x["b+"] = LoRALinear.from_linear(model.x["b+"], rank=3, alpha=1, dropout=0.0)
    return train(EfficientFineTuningManager(model)).model


# name -> (model, what is saved, options of the save, options of the load)
CASES = {
    "head": ("small", lambda: manager_of("small").apply_lora(rank=2, alpha=3, use_rslora=True, modules_to_save="head"), {}, {}),
    "patterns": ("small", patterns, {}, {}),
    "nested": ("nested", nested, {}, {}),
    "second": ("small", second, {"adapter": "two"}, {}),
    "convolutions": ("convolutions", lambda: manager_of("convolutions").apply_lora(["one", "two", "point", "three", "head"], rank=2, bias=True), {}, {}),
    "gpt2": ("gpt2", lambda: manager_of("gpt2").apply_lora("c_attn", rank=2), {}, {}),
    "llama": ("llama", lambda: manager_of("llama").apply_lora(["q_proj", "v_proj"], rank=2), {}, {}),
    "bf16": ("llama", lambda: manager_of("llama").apply_lora("q_proj", rank=2), {"dtype": torch.bfloat16}, {}),
    "bert": ("bert", lambda: manager_of("bert").apply_lora("query", rank=2, modules_to_save="classifier"), {}, {}),
    "t5": ("t5", lambda: manager_of("t5").apply_lora(["q", "wo"], rank=2), {}, {}),
    "qlora": ("llama4bit", lambda: manager_of("llama64").apply_qlora(["q_proj", "v_proj"], rank=2, double_quant=False, compute_dtype=torch.float32, dropout_probability=0.0), {}, {}),
    "adalora": ("small", lambda: manager_of("small").apply_adalora(["a", "b"], rank=4, form="svd"), {}, {}),
    "compacted": ("small", compacted, {}, {}),
    "scores": ("small", lambda: manager_of("small").apply_adalora(["a", "b"], rank=4), {}, {}),
    "prompt": ("llama", lambda: manager_of("llama").apply_prompt_tuning(3), {}, {}),
    "prompt_bert": ("bert", lambda: manager_of("bert").apply_prompt_tuning(3, modules_to_save="classifier"), {}, {}),
    "prompt_t5": ("t5", lambda: manager_of("t5").apply_prompt_tuning(3), {}, {}),
    "ptuning": ("llama", lambda: manager_of("llama").apply_ptuning(3), {}, {}),
    "prefix": ("llama", lambda: manager_of("llama").apply_prefix_tuning(prefix_length=3), {}, {}),
    "prefix_gpt2": ("gpt2", lambda: manager_of("gpt2").apply_prefix_tuning(prefix_length=3), {}, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory):
    """Every case saved, read by plain PEFT in one process, and written by it: {case: (source, folder, complaints)}."""
    root = tmp_path_factory.mktemp("peft")
    sources = {}
    for case, (model, make, options, _) in CASES.items():
        torch.manual_seed(len(case))
        source = make()
        manager = source if isinstance(source, EfficientFineTuningManager) else EfficientFineTuningManager(source)
        sources[case] = (train(manager) if case not in ("patterns", "nested", "compacted") else manager).model
        (root / case).mkdir()
        (root / case / "case.json").write_text(json.dumps({"model": model}))
        save_adapter(source, root / case / "adapter", **options)
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    subprocess.run([sys.executable, str(SUPPORT / "peft_reader.py"), str(root)], check=True, env=environment, cwd=root)
    done = json.loads((root / "done.json").read_text())
    return {case: (sources[case], root / case, done[case]) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, round_trip, tmp_path):
    source, folder, complaints = round_trip[case]
    model, _, _, options = CASES[case]
    # PEFT says this of its own compacted AdaLoRA files too, whose rank_pattern it then goes by.
    assert [each for each in complaints if "rank_pattern keys" not in each] == []
    want = output(source, "llama64" if model == "llama4bit" else model)
    got = torch.load(folder / "output.pt")
    scale = want.abs().max()
    tolerance = 2e-2 if case == "bf16" else 2e-5
    assert (got - want).abs().max() <= tolerance * scale
    bare = output(build(model), model)
    assert (bare - want[:, -bare.shape[1] :]).abs().max() > 20 * tolerance * scale
    # what PEFT wrote has the tensors that we wrote, and loads
    ours, theirs = (load_file(folder / each / "adapter_model.safetensors") for each in ("adapter", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].to(theirs[key].dtype), theirs[key]) for key in ours)
    twin = load_adapter(build(model), folder / "again", **options)
    torch.testing.assert_close(output(twin.model, model), got, rtol=2e-5, atol=2e-5 * float(scale))
    save_adapter(twin, tmp_path / "last")
    last = load_file(tmp_path / "last" / "adapter_model.safetensors")
    assert last.keys() == ours.keys() and all(torch.equal(last[key].to(ours[key].dtype), ours[key]) for key in ours)


def test_four_bits_from_a_file(round_trip):
    """A file of LoRA over layers that are quantised first, and over bitsandbytes' own (in the round trip)."""
    source, folder, _ = round_trip["qlora"]
    twin = load_adapter(
        build("llama64"), folder / "again", method="qlora", double_quant=False, compute_dtype=torch.float32
    )
    assert twin.methods["default"]["method"] == "qlora"
    assert torch.equal(output(twin.model, "llama64"), output(source, "llama64"))


@torch.no_grad()
def theirs(name, config, steps=0):
    """A PEFT model with values in everything that it trains."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(name), config).eval()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and "ranknum" not in key:
            parameter.normal_(0, 0.3)
    return model


def _configs():
    import peft as p

    target = {"target_modules": ["q_proj", "v_proj"]}
    return {
        "lora": ("llama", p.LoraConfig(r=4, lora_alpha=6, use_rslora=True, lora_bias=True, rank_pattern={"layers.0.self_attn.q_proj": 2},
                                       alpha_pattern={"v_proj": 9}, task_type="CAUSAL_LM", **target)),
        "expression": ("llama", p.LoraConfig(r=4, target_modules=r".*\.1\..*_proj", layers_to_transform=None)),
        "head": ("bert", p.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")),
        "adalora": ("llama", p.AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=5, **target)),
        "text": ("llama", p.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        "both halves": ("t5", p.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")),
        "mlp": ("llama", p.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM")),
        "lstm": ("gpt2", p.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", task_type="CAUSAL_LM")),
        "projected": ("llama", p.PrefixTuningConfig(num_virtual_tokens=3, encoder_hidden_size=8, prefix_projection=True, task_type="CAUSAL_LM")),
        "head of a prompt": ("bert", p.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")),
    }  # fmt: skip


@pytest.mark.parametrize("case", _configs())
def test_what_peft_trained(case, tmp_path):
    name, config = _configs()[case]
    model = theirs(name, config)
    if case == "adalora":  # as its allocator leaves it
        for i, layer in enumerate(m for m in model.modules() if hasattr(m, "ranknum")):
            layer.lora_E["default"].data[i % 3] = 0.0
        keys = [key.replace(".default", "") for key, _ in model.base_model.model.named_parameters() if "lora_E" in key]
        config = model.peft_config["default"]
        config.rank_pattern = {key: [j != i % 3 for j in range(4)] for i, key in enumerate(keys)}
    want = output(model, name)
    model.save_pretrained(tmp_path / "a")
    twin = load_adapter(build(name), tmp_path / "a")
    got = output(twin.model.eval(), name)
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    assert all(p.requires_grad for entry in twin.entries for p in entry.parameters())


def test_half_precision_bases(tmp_path):
    """A file of 16 bits over a base of 16 bits: the adapter is in fp32, as PEFT has it, and the file as it was."""
    manager = train(manager_of("llama", dtype=torch.bfloat16).apply_lora("q_proj", rank=2))
    save_adapter(manager, tmp_path / "a", dtype=torch.bfloat16)
    for base, kind in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        twin = load_adapter(build("llama", base), tmp_path / "a")
        assert twin.entries[0].module.lora_A.dtype == kind
        save_adapter(twin, tmp_path / "b", dtype=torch.bfloat16)
        one, other = (load_file(tmp_path / each / "adapter_model.safetensors") for each in "ab")
        assert all(torch.equal(one[key], other[key]) and one[key].dtype == torch.bfloat16 for key in one)
    narrow = load_adapter(build("llama", torch.bfloat16), tmp_path / "a", adapter_dtype=torch.bfloat16)
    assert narrow.entries[0].module.lora_A.dtype == torch.bfloat16


def saved(tmp_path, make, **options):
    save_adapter(make, tmp_path / "a", **options)
    return json.loads((tmp_path / "a" / "adapter_config.json").read_text())


def test_config_says_what_is_meant(tmp_path):
    config = saved(tmp_path, patterns())
    assert config["target_modules"] == ["a", "b", "head"] and config["r"] == 3 and config["lora_bias"]
    assert config["rank_pattern"] == {r"^body\.a": 2} and config["lora_alpha"] == 5
    assert config["alpha_pattern"] == {r"^body\.b": 0.03, "^head": 3}
    config = saved(tmp_path, manager_of("llama").apply_lora(r".*layers\.0.*q_proj", rank=2), base_model="me/llama")
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert (config["base_model_name_or_path"], config["task_type"]) == ("me/llama", "CAUSAL_LM")
    config = saved(tmp_path, nested())
    assert config["target_modules"] == r"(?:a|x\.b\+)"  # the end of x.a is a, too


def test_scaling_is_exact(tmp_path):
    for scaling, rank in ((0.01, 3), (0.1, 7), (1 / 3, 11), (math.pi, 5)):
        layer = torch.nn.ModuleDict({"a": LoRALinear.from_linear(torch.nn.Linear(12, 12), rank=rank, scaling=scaling)})
        config = saved(tmp_path, layer)
        assert config["lora_alpha"] / config["r"] == scaling
        twin = load_adapter(torch.nn.ModuleDict({"a": torch.nn.Linear(12, 12)}), tmp_path / "a")
        assert twin.model["a"].scaling == scaling


@pytest.mark.parametrize("most", [64, "0.2KB", "1GB"])
def test_shards(most, tmp_path):
    manager = train(manager_of("small").apply_lora(rank=2, modules_to_save="head"))
    save_adapter(manager, tmp_path / "a", max_shard_size=most)
    files = sorted(os.listdir(tmp_path / "a"))
    parts = [name for name in files if "-of-" in name]
    assert bool(parts) == (most != "1GB") and ("adapter_model.safetensors.index.json" in files) == bool(parts)
    twin = load_adapter(build("small"), tmp_path / "a")
    assert torch.equal(output(twin.model.eval(), "small"), output(manager.model.eval(), "small"))
    # the next save replaces all of them, and keeps what is not its own
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / "a" / "logs").mkdir()
    (tmp_path / "a" / "logs" / "one").write_text("too")
    save_adapter(manager, tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "logs",
        "notes.txt",
    ]
    assert (tmp_path / "a" / "logs" / "one").read_text() == "too" and sorted(os.listdir(tmp_path)) == ["a"]


def test_named_adapters(tmp_path):
    manager = train(second())
    for name in ("one", "two"):
        save_adapter(manager, tmp_path / name, adapter=name)
    with pytest.raises(ValueError, match=r"adapter must be one of \['one', 'two'\], got None"):
        save_adapter(manager, tmp_path / "x")
    twin = load_adapter(build("small"), tmp_path / "one", adapter="one")
    load_adapter(twin, tmp_path / "two", adapter="two")
    twin.switch("two")
    assert torch.equal(output(twin.model.eval(), "small"), output(manager.model.eval(), "small"))
    with pytest.raises(ValueError, match=r"adapter must be given beside \['one', 'two'\]"):
        load_adapter(twin, tmp_path / "two")


def test_into_adapters_that_are_there(tmp_path):
    """A manager's only adapter, and hand-made modules, take the values: the Parameters stay an optimizer's."""
    manager = train(manager_of("small").apply_lora(["a", "b"], rank=2, bias=True))
    save_adapter(manager, tmp_path / "a")
    want = output(manager.model.eval(), "small")
    twin = manager_of("small").apply_lora(["a", "b"], rank=2, bias=True)
    held = [id(p) for p in twin.get_trainable_parameters()]
    assert load_adapter(twin, tmp_path / "a") is twin and list(twin.methods) == ["lora"]
    assert [id(p) for p in twin.get_trainable_parameters()] == held
    assert torch.equal(output(twin.model.eval(), "small"), want)
    model = build("small")
    for name in ("a", "b"):
        model.body[name] = LoRALinear.from_linear(model.body[name], rank=2, layout="in_out", bias=True)
    load_adapter(model, tmp_path / "a")
    assert torch.equal(output(model.eval(), "small"), want)
    merged = manager.merge()
    assert not torch.equal(output(merged, "small"), output(build("small"), "small"))
    save_adapter(manager, tmp_path / "merged")
    one, other = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("a", "merged"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_heads_of_models_without_a_manager(tmp_path):
    """Hand-made modules, and a head that was trained beside them."""
    model = build("small")
    model.body["a"] = LoRALinear.from_linear(model.body["a"], rank=2)
    with torch.no_grad():
        model.head.bias.fill_(3.0)
    save_adapter(model, tmp_path / "a", modules_to_save="head")
    twin = load_adapter(build("small"), tmp_path / "a")
    assert list(twin.saved_modules) == ["head"] and twin.model.head.bias.tolist() == [3.0] * 3
    assert twin.model.head.bias.requires_grad and not twin.model.body["b"].weight.requires_grad


def test_wrapped_models(tmp_path):
    """Names are those of the model that torch.compile is around."""
    manager = train(manager_of("small").apply_lora("a", rank=2))
    save_adapter(torch.compile(manager.model), tmp_path / "a")
    assert set(load_file(tmp_path / "a" / "adapter_model.safetensors")) == {
        f"base_model.model.body.a.lora_{x}.weight" for x in "AB"
    }
    twin = load_adapter(torch.compile(build("small")), tmp_path / "a")
    assert torch.equal(output(twin.model.eval(), "small"), output(manager.model.eval(), "small"))


@pytest.mark.parametrize("kind", ["encoder", "projected"])
def test_virtual_tokens_without_a_manager(kind, tmp_path):
    """What insert_prompt and insert_prefix put in; a file has the table that the encoder makes."""
    model = build("llama")
    if kind == "encoder":
        insert_prompt(model, PromptEncoder(3, 16, encoder="lstm", hidden_size=8))
    else:
        insert_prefix(model, PrefixEncoder(3, 2, 2, 4, projection_dim=8))
    want = output(model.eval(), "llama")
    config = saved(tmp_path, model)
    assert config["peft_type"] == ("P_TUNING" if kind == "encoder" else "PREFIX_TUNING")
    twin = load_adapter(build("llama"), tmp_path / "a")
    torch.testing.assert_close(output(twin.model.eval(), "llama"), want)
    again = load_adapter(model, tmp_path / "a")  # into its own encoder, in whose place the table is then
    torch.testing.assert_close(output(again.model.eval(), "llama"), want)
    other = build("llama")
    insert_prompt(other, PromptEmbedding(3, 16)) if kind == "projected" else insert_prefix(
        other, PrefixTuning(2, 2, 4, 3)
    )
    with pytest.raises(ValueError, match=r"prompt_embeddings in .* must be of the method of adapter 'default'"):
        load_adapter(other, tmp_path / "a")
    if kind == "projected":
        with pytest.raises(ValueError, match=r"prompt_embeddings in .* must be of the model's"):
            load_adapter(build("gpt2"), tmp_path / "a")


def test_tied_modules(tmp_path):
    """PEFT trains a copy of a tied head, and leaves the embedding: no file may mean two things."""
    manager = manager_of("gpt2").apply_lora("c_attn", rank=2, modules_to_save="lm_head")
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight|lm_head.weight must be untied, or come under all"):
        save_adapter(manager, tmp_path / "a")
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"])
    theirs("gpt2", config).save_pretrained(tmp_path / "a")
    model = build("gpt2")
    before = picture(model)
    with pytest.raises(ValueError, match=r"lm_head.weight in .* must be untied, .*got \['transformer.wte.weight'\]"):
        load_adapter(model, tmp_path / "a")
    assert_same(before, picture(model))
    # under both names it is one value
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.transformer.wte.weight"] = tensors["base_model.model.lm_head.weight"].clone()
    save_file(tensors, file)
    twin = load_adapter(model, tmp_path / "a")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, tensors["base_model.model.lm_head.weight"])
    save_adapter(twin, tmp_path / "b")
    assert load_file(tmp_path / "b" / "adapter_model.safetensors").keys() == tensors.keys()


def test_torch_archives_are_read(tmp_path):
    manager = train(manager_of("small").apply_lora("a", rank=2))
    save_adapter(manager, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "a" / "adapter_model.bin")
    file.unlink()
    twin = load_adapter(build("small"), tmp_path / "a")
    assert torch.equal(output(twin.model.eval(), "small"), output(manager.model.eval(), "small"))


def attention():
    return torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)


NO_PLACE = {
    "gate": (lambda: manager_of("small").apply_attention_guided_lora("a"), "its update is one matrix|one matrix"),
    "adapter": (lambda: manager_of("small").apply_adapter("a"), "must be LoRA on a linear layer or a convolution"),
    "attention": (lambda: EfficientFineTuningManager(attention()).apply_lora("self_attn"), "must be LoRA on a linear layer"),
    "recurrent": (lambda: EfficientFineTuningManager(torch.nn.ModuleDict({"l": torch.nn.LSTM(4, 4)})).apply_lora("l"), "must be LoRA on a linear"),
    "pissa": (lambda: manager_of("small").apply_lora("a", rank=2, init="pissa"), "must leave the base weights as they were"),
    "dilation": (lambda: EfficientFineTuningManager(torch.nn.ModuleDict({"c": torch.nn.Conv2d(4, 4, 3, dilation=2)})).apply_lora("c"), "must have groups=1, dilation=1"),
    "prefix_bert": (lambda: manager_of("bert").apply_prefix_tuning(prefix_length=2), "must be a causal language model for a prefix"),
    "prefix_t5": (lambda: manager_of("t5").apply_prefix_tuning(prefix_length=2), "must be a causal language model for a prefix"),
    "held": (lambda: EfficientFineTuningManager(attention()).apply_prompt_tuning(2), "must be a transformers model for virtual tokens"),
    "adalora bias": (lambda: manager_of("small").apply_adalora("a", rank=2, form="svd", bias=True), "bias must be False: PEFT's AdaLoRA"),
    "alone": (lambda: torch.nn.ModuleDict({"lora": LoRALayer(4, 4)}), "must be LoRA on a linear layer or a convolution"),
    "none": (lambda: manager_of("small"), "source must have adapters, got none"),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_PLACE)
def test_what_has_no_place_in_the_format(what, tmp_path):
    make, text = NO_PLACE[what]
    source = make()
    with pytest.raises(ValueError, match=text):
        save_adapter(source, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_values_that_are_not_finite_are_not_written(tmp_path):
    model = torch.nn.ModuleDict({"a": LoRALinear.from_linear(torch.nn.Linear(4, 4), rank=1)})
    with torch.no_grad():
        model["a"].lora_A[0, 0] = 1e20
    with pytest.raises(ValueError, match=r"a \(a\) must be finite in torch.float16"):
        save_adapter(model, tmp_path / "a", dtype=torch.float16)
    with torch.no_grad():
        model["a"].lora_A[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"a \(a\) must be finite, got inf or nan"):
        save_adapter(model, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_arguments(tmp_path):
    manager = manager_of("small").apply_lora("a", rank=2)
    for wrong, kind, text in (
        ({"format": "gguf"}, ValueError, "format must be one of peft, kohya, loralib, got 'gguf'"),
        ({"max_shard_size": "5 apples"}, ValueError, "max_shard_size must be bytes, or a size like"),
        ({"max_shard_size": 0}, ValueError, "max_shard_size must be positive"),
        ({"prefix": "x"}, TypeError, "prefix must be a known option"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32"),
        ({"adapter": "x"}, ValueError, r"adapter must be one of \['lora'\], got 'x'"),
    ):
        with pytest.raises(kind, match=text):
            save_adapter(manager, tmp_path / "a", **wrong)
    with pytest.raises(TypeError, match="source must be a manager or an nn"):
        save_adapter(3, tmp_path / "a")
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(build("small"), peft.LoraConfig(target_modules=["a"]))
    with pytest.raises(ValueError, match="model must hold no adapters of PEFT"):
        save_adapter(theirs, tmp_path / "a")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="path must be a folder, got the file"):
        save_adapter(manager, tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
