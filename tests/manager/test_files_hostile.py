"""Files that are damaged, foreign, malicious or for another model: refused by name, and the model is as it was."""

import copy
import json
import os
import pickle
import struct
from random import Random

import pytest
import torch

from fastpeft import EfficientFineTuningManager, load_adapter, save_adapter
from manager_cases import Small, assert_same, picture, train

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

A = "base_model.model.body.a.lora_A.weight"
B = A.replace("_A", "_B")


@pytest.fixture
def folder(tmp_path):
    """A sound adapter on body.a, with the head beside it."""
    manager = EfficientFineTuningManager(Small()).apply_lora("a", rank=2, modules_to_save="head")
    save_adapter(train(manager), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(path, text, *errors, **options):
    """That loading raises, with ``text``, and changes nothing: neither of a plain model nor of an adapted one."""
    for manager in (EfficientFineTuningManager(Small()), EfficientFineTuningManager(Small()).apply_lora("a", rank=2)):
        before, methods = picture(manager.model), copy.copy(manager.methods)
        with pytest.raises(errors or (ValueError,), match=text):
            load_adapter(manager, path, **options)
        assert_same(before, picture(manager.model))
        assert manager.methods == methods and manager.saved_modules == {}


CONFIGS = {
    "ia3": ({"peft_type": "IA3"}, "peft_type in .*adapter_config.json must be one of LORA, ADALORA.*got 'IA3'"),
    "none": ({"peft_type": None}, "peft_type in .* must be one of"),
    "dora": ({"use_dora": True}, "use_dora in .*adapter_config.json must be unset: fastpeft has no such option, got True"),
    "experts": ({"target_parameters": ["x"]}, r"target_parameters in .* must be unset.*got \['x'\]"),
    "future": ({"use_magic": {"a": 1}}, "use_magic in .* must be unset"),
    "bias": ({"bias": "all"}, "bias in .* must be 'none'.*got 'all'"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights in .* must be one that leaves the base weights"),
    "rank": ({"r": 3}, "body.a.lora_A.weight in .*adapter_model.safetensors must have 3 rows, the rank that .* says, got .2, 8."),
    "pattern": ({"rank_pattern": {"a": 5}}, "lora_A.weight in .* must have 5 rows"),
    "no pattern": ({"alpha_pattern": [1]}, "alpha_pattern in .* must be an object, got list"),
    "expression": ({"alpha_pattern": {"(": 1}}, "alpha_pattern in .* must hold regular expressions, got '\\('"),
    "alpha": ({"lora_alpha": "16"}, "lora_alpha in .* must be a number below 1e.30, got '16'"),
    "infinite": ({"lora_alpha": float("inf")}, "lora_alpha in .* must be a number below 1e.30, got inf"),
    "huge": ({"lora_alpha": 10**400}, "lora_alpha in .* must be a number below 1e.30, got 1000"),
    "nan": ({"lora_alpha": float("nan")}, "lora_alpha in .* must be a number below 1e.30, got nan"),
    "whole": ({"modules_to_save": "head"}, "modules_to_save in .* must be null or a list of names"),
    "adalora": ({"peft_type": "ADALORA"}, "must hold tensors base_model.model.<module>.lora_A, got none"),
    "prompt": ({"peft_type": "PROMPT_TUNING"}, "must hold a tensor prompt_embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_config(what, folder):
    change, text = CONFIGS[what]
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(folder, text)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 100_000, '{"peft_type": "LORA"'])
def test_config_that_is_no_object(text, folder):
    (folder / "adapter_config.json").write_text(text)
    refused(folder, "adapter_config.json must be (JSON|a JSON object)")


def renamed(tensors, old, new):
    return {key.replace(old, new): value for key, value in tensors.items()}


TENSORS = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != B}, "body.a.lora_A.weight in .* must come with lora_B.weight"),
    "unknown": (lambda t: t | {"x": torch.ones(1)}, "x in .*adapter_model.safetensors must be named base_model.model."),
    "foreign": (lambda t: t | {"base_model.model.other.weight": torch.ones(1)}, "other.weight in .* must name a tensor of the model"),
    "module": (lambda t: renamed(t, "body.a", "body.c"), "body.c.lora_A.weight in .* must name a module of the model, got 'body.c'"),
    "container": (lambda t: renamed(t, "body.a", "body"), "body.lora_A.weight in .* must name a linear layer or a convolution, got ModuleDict"),
    "inputs": (lambda t: t | {A: torch.ones(2, 9)}, r"lora_A.weight in .* must have shape \[r, 8\], by the model's layer, got \[2, 9\]"),
    "outputs": (lambda t: t | {B: torch.ones(9, 2)}, "lora_B.weight in .* must have 8 rows, by the model's layer, got .9, 2."),
    "ranks": (lambda t: t | {B: torch.ones(8, 3)}, r"lora_B.weight in .* must have shape \[8, 2\] beside .*lora_A"),
    "dimensions": (lambda t: t | {A: torch.ones(2)}, "lora_A.weight in .* must"),
    "empty": (lambda t: t | {A: torch.ones(0, 8), B: torch.ones(8, 0)}, "lora_A.weight in .* must"),
    "kernel": (lambda t: t | {A: torch.ones(2, 8, 3, 3), B: torch.ones(8, 2, 1, 1)}, r"lora_A.weight in .* must have shape \[r, 8\]"),
    "nan": (lambda t: t | {A: torch.full((2, 8), torch.nan)}, "lora_A.weight in .* must be finite, got inf or nan"),
    "integers": (lambda t: t | {A: torch.ones(2, 8, dtype=torch.int64)}, "lora_A.weight in .* must be float32, .*got torch.int64"),
    "eight bits": (lambda t: t | {A: torch.ones(2, 8).to(torch.float8_e4m3fn)}, "must be float32, .*got torch.float8_e4m3fn"),
    "magnitude": (lambda t: t | {A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(8)}, "lora_magnitude_vector in .* must be a tensor of a method"),
    "embedding": (lambda t: t | {A.replace("lora_A.weight", "lora_embedding_A"): torch.ones(2, 8)}, "lora_embedding_A in .* must be a tensor of a method"),
    "head": (lambda t: t | {"base_model.model.head.weight": torch.ones(2, 2)}, r"head.weight in .* must have shape \[3, 12\], got \[2, 2\]"),
    "head dtype": (lambda t: t | {"base_model.model.head.weight": torch.ones(3, 12, dtype=torch.int32)}, "head.weight in .* must have a dtype like torch.float32"),
    "half a head": (lambda t: {k: v for k, v in t.items() if not k.endswith("head.bias")}, "the file's 'head' must hold all tensors of the module, got no .'bias'."),
    "head nan": (lambda t: t | {"base_model.model.head.bias": torch.full((3,), torch.inf)}, "head.bias in .* must be finite"),
    "around": (lambda t: t | {"base_model.model.body.a.weight": torch.ones(8, 8), "base_model.model.body.a.bias": torch.ones(8)}, "the file's 'body.a' must be a module without adapters"),
}  # fmt: skip


def test_values_that_overflow(folder):
    """In the dtype that the adapter, or the head, has in the model: 16 bits that somebody asked for."""
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {A: torch.full((2, 8), 1e5)}, file)
    for options in ({"adapter_dtype": torch.float16}, {"adapter_dtype": torch.float16, "method": "qlora"}):
        model = Small()
        before = picture(model)
        with pytest.raises(
            ValueError, match=r"body\.a\.lora_A.weight in .* must be finite in torch.float16, as the model"
        ):
            load_adapter(model, folder, **options)
        assert_same(before, picture(model))
    manager = EfficientFineTuningManager(Small()).apply_lora("a", rank=2, adapter_dtype=torch.float16)
    before = picture(manager.model)
    with pytest.raises(ValueError, match=r"must be finite in torch\.float16"):
        load_adapter(manager, folder)
    model = Small(torch.float16)
    save_file(load_file(file) | {"base_model.model.head.bias": torch.full((3,), 1e5)}, file)
    with pytest.raises(ValueError, match=r"head\.bias in .* must be finite in torch.float16"):
        load_adapter(model, folder)
    assert_same(before, picture(manager.model))


@pytest.mark.parametrize("what", TENSORS)
def test_tensors(what, folder):
    change, text = TENSORS[what]
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    refused(folder, text, ValueError, TypeError)


def test_files_that_are_missing(folder):
    refused(folder / "x", "path must be a folder", FileNotFoundError)
    (folder / "adapter_model.safetensors").rename(folder / "other.safetensors")
    refused(folder, "path must hold adapter_model.safetensors, its shards or adapter_model.bin", FileNotFoundError)
    refused(folder / "other.safetensors", "path must be a folder for PEFT's format")
    (folder / "adapter_config.json").unlink()
    refused(folder, "path must hold adapter_config.json", FileNotFoundError)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_pickles(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / "adapter_model.safetensors").unlink()
    for data in (pickle.dumps(Evil()), pickle.dumps({A: 1}), b"", b"text"):
        (folder / "adapter_model.bin").write_bytes(data)
        refused(folder, "adapter_model.bin must be torch's archive of tensors alone")
    for held in ({A: Evil()}, [Evil()]):
        torch.save(held, folder / "adapter_model.bin")
        refused(folder, "adapter_model.bin must be torch's archive of tensors alone, got UnpicklingError")
        torch.save(held, folder / "l.pt")
        refused(folder / "l.pt", "l.pt must be torch's archive of tensors alone, got UnpicklingError")
    torch.save([torch.ones(1)], folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin must hold tensors by their names and nothing else, got list")
    assert not (folder.parent / "evil").exists()


def with_header(data, change):
    """The file with its header changed: a function of the parsed one, or of its bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    header = change(json.loads(data[8 : 8 + size]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def entry(header, **change):
    return header | {A: header[A] | change}


HEADERS = {
    "overlap": lambda d: with_header(d, lambda h: entry(h, data_offsets=h[B]["data_offsets"])),
    "hole": lambda d: with_header(d, lambda h: entry(h, data_offsets=[each + 4 for each in h[A]["data_offsets"]])),
    "beyond": lambda d: with_header(d, lambda h: entry(h, data_offsets=[10**12, 10**12 + 64])),
    "negative": lambda d: with_header(d, lambda h: entry(h, data_offsets=[-64, 0])),
    "turned": lambda d: with_header(d, lambda h: entry(h, data_offsets=h[A]["data_offsets"][::-1])),
    "no such dtype": lambda d: with_header(d, lambda h: entry(h, dtype="F33")),
    "other dtype": lambda d: with_header(d, lambda h: entry(h, dtype="F64")),
    "huge shape": lambda d: with_header(d, lambda h: entry(h, shape=[2**62, 2**62])),
    "other shape": lambda d: with_header(d, lambda h: entry(h, shape=[2, 9])),
    "no shape": lambda d: with_header(d, lambda h: h | {A: {"dtype": "F32"}}),
    "a list": lambda d: with_header(d, lambda h: [h]),
    "no json": lambda d: with_header(d, lambda h: b"{" * 50),
    "deep": lambda d: with_header(d, lambda h: b'{"a":' * 50_000),
    "long header": lambda d: struct.pack("<Q", 2**63 - 1) + d[8:],
    "longer header": lambda d: struct.pack("<Q", len(d)) + d[8:],
    "nothing": lambda d: b"",
    "half": lambda d: d[: len(d) // 2],
    "a byte less": lambda d: d[:-1],
    "a byte more": lambda d: d + b"\x00",
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers(what, folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(HEADERS[what](file.read_bytes()))
    refused(folder, "adapter_model.safetensors must be a whole safetensors file")


def test_fuzzed_bytes(folder):
    """Any file is read or refused with the house's errors; a refusal changes nothing."""
    file, random = folder / "adapter_model.safetensors", Random(0)
    whole, errors = file.read_bytes(), 0
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(random.randint(1, 3)):
            data[random.randrange(size)] = random.randrange(256)
        file.write_bytes(data)
        model = Small()
        before = picture(model)
        try:
            load_adapter(model, folder)
        except (ValueError, TypeError) as error:
            assert str(error).startswith("load_adapter: "), error
            assert_same(before, picture(model))
            errors += 1
    assert errors > 100


def test_indices(folder):
    manager = EfficientFineTuningManager(Small()).apply_lora("a", rank=2)
    save_adapter(train(manager), folder, max_shard_size=64)
    index = folder / "adapter_model.safetensors.index.json"
    sound = json.loads(index.read_text())
    first = sound["weight_map"][A]
    for change, text in (
        ({A: "../" + first}, "index.json must name safetensors files of its own folder, got '../adapter"),
        ({A: "/etc/passwd"}, "must name safetensors files of its own folder"),
        ({A: "missing.safetensors"}, "path must be a file"),
        ({A: sound["weight_map"][B]}, "must hold the tensors that the index has there"),
        ({A: 3}, "index.json must have a weight_map of names to files"),
    ):
        index.write_text(json.dumps({"weight_map": sound["weight_map"] | change}))
        refused(folder, text, ValueError, FileNotFoundError)
    index.write_text("{}")
    refused(folder, "index.json must have a weight_map of names to files, got NoneType")
    index.write_text(json.dumps(sound))
    (folder / first).write_bytes((folder / first).read_bytes()[:-1])
    refused(folder, "must be a whole safetensors file")


def test_arguments(folder):
    for options, text in (
        ({"rank": 4}, "rank must be left out: the file says it, got given"),
        ({"method": "adalora"}, "method must be one of None, lora, qlora, got 'adalora'|options must be left out"),
        ({"format": "kohya"}, "path must be a file|be a whole"),
        ({"format": "x"}, "format must be one of None, peft, kohya, loralib"),
        ({"adapter": "a.b"}, "adapter_name must be a name without dots"),
    ):
        refused(folder, text, ValueError, FileNotFoundError, **options)
    model = Small()
    before = picture(model)
    with pytest.raises(TypeError, match="must be a known option"):
        load_adapter(model, folder, magic=3)
    assert_same(before, picture(model))


def test_a_second_head_is_refused(folder):
    """One head for all adapters of a model: another one's values are not overwritten."""
    manager = load_adapter(Small(), folder, "one")
    load_adapter(manager, folder, "same")
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.head.bias": torch.ones(3)}, file)
    before = picture(manager.model)
    with pytest.raises(ValueError, match=r"head\.bias in .* must be what the other adapters of the model have there"):
        load_adapter(manager, folder, "two")
    assert_same(before, picture(manager.model))
