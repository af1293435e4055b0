"""docs/when_to_accelerate.md: each row of its tables names tests that are there; and those that stand nowhere else."""

from __future__ import annotations

import ast
import re
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch import distributed

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastpeft
from fastpeft import dispatch
from peft_cases import accelerated, batch, lora_layers, toy

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "when_to_accelerate.md"
OWED = (
    "Trainer", "TRL", "Accelerate", "DDP", "FSDP1", "FSDP2", "ZeRO", "Lightning", "diffusers", "sentence-transformers",
    "device_map", "compile", "export", "spawn", "pickle", "checkpoint", "EMA",
)  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rows():
    """The cells of each row of the page's tables; nothing but rows, titles and the first paragraph is on the page."""
    head, *rest = PAGE.read_text().split("\n\n")
    assert head.startswith("# ")
    for block in rest[1:]:
        lines = block.strip().splitlines()
        if lines[0].startswith("#"):
            continue
        assert all(line.startswith("|") for line in lines), f"not a row, so that no test stands behind it: {block}"
        yield from (re.split(r"\s*\|\s*", line.strip("| ")) for line in lines[2:])


def test_each_row_names_tests_that_are_there():
    found = list(rows())
    for name in OWED:
        assert any(name.lower() in row[0].lower() for row in found), f"no row for {name}"
    functions = {}
    for row in found:
        assert len(row) == 3, row
        named = re.findall(r"`(test_\w+)::(test_\w+)(?:\[(\w+)\])?`", row[2])
        assert named, f"no test behind {row[0]}"
        for file, function, case in named:
            (path,) = (ROOT / "tests").rglob(f"{file}.py")
            if path not in functions:
                tree = ast.walk(ast.parse(path.read_text()))
                functions[path] = {node.name for node in tree if isinstance(node, ast.FunctionDef)}
            assert function in functions[path], f"{file} has no {function}"
            assert not case or f'"{case}"' in path.read_text(), f"{file} has no case {case}"


def gradients(model, x, call=None):
    model.zero_grad()
    torch.manual_seed(3)
    (call or model)(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_ddp_wraps_first(tmp_path):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, x = toy(), batch()["x"]
        wanted = gradients(model, x)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        assert fastpeft.accelerate(parallel).changed == 3
        found = gradients(model, x, parallel)
    finally:
        distributed.destroy_process_group()
    assert fastpeft.status(parallel).served == 3 and found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_compile_comes_first():
    """A model that has been compiled, and called, follows: its layers' classes are among the guards."""
    model, x = toy(), batch()["x"]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    wanted = compiled(x)
    assert fastpeft.accelerate(compiled).changed == 3
    before = fastpeft.status(model).graphs
    torch.testing.assert_close(compiled(x), wanted)
    assert fastpeft.status(model).graphs[0] == before[0] + 3


def test_spawn():
    """What a spawned process gets is plain PEFT, with the same weights in shared memory; `accelerate` serves it there."""
    model, x = accelerated(toy()), batch()["x"]
    there = ForkingPickler.loads(ForkingPickler.dumps(model))
    assert {type(layer) for layer in lora_layers(there)} == {PeftLinear}
    assert there.base_model.model.head.weight.data_ptr() == model.base_model.model.head.weight.data_ptr()
    assert fastpeft.accelerate(there).changed == 3
    torch.testing.assert_close(there(x), model(x), rtol=0, atol=0)


def saves_ours(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op.namespace == "fastpeft" else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(("saved", "runs"), [
    (None, 6), (saves_ours, 3), ([torch.ops.fastpeft.lora_linear_fwd.default], 3), ([torch.ops.aten.mm.default], 6),
])  # fmt: skip
def test_selective_checkpointing(saved, runs, monkeypatch):
    """What a policy saves is not computed again; the gradients are the same, dropout's masks too."""
    model, x = accelerated(toy(lora_dropout=0.3)), batch()["x"].requires_grad_()
    wanted = gradients(model, x)
    ran, load = [], dispatch.load
    monkeypatch.setattr(dispatch, "load", lambda op, backend: ran.append(op) or load(op, backend))
    policy = {} if saved is None else {"context_fn": lambda: create_selective_checkpoint_contexts(saved)}
    found = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False, **policy))
    assert ran.count("lora_linear_fwd") == runs and ran.count("lora_linear_bwd") == 3
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_ema():
    """An average of an accelerated model is accelerated, and averages what an average of plain PEFT does."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    def trained(model):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            gradients(model, batch()["x"])
            optimizer.step()
            average.update_parameters(model)
        return average

    plain = toy()
    ours = toy()
    ours.load_state_dict(plain.state_dict())
    average, wanted = trained(accelerated(ours)), trained(plain)
    torch.testing.assert_close(dict(average.state_dict()), dict(wanted.state_dict()))
    torch.testing.assert_close(average(batch()["x"]), wanted(batch()["x"]))
    assert fastpeft.status(average).served == 3 and not fastpeft.status(average).left


def tiny_bert(folder):
    """A model and its tokenizer of two words, saved as ``from_pretrained`` reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=4, **sizes)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "film": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)
    return str(folder)


def test_sentence_transformers(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.20")  # as test_peft_patch says
    model = SentenceTransformer(tiny_bert(tmp_path), device="cpu")
    model.add_adapter(LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
    wanted = model.encode(["good film", "film"], convert_to_tensor=True)
    assert fastpeft.accelerate(model).changed == 2
    torch.testing.assert_close(model.encode(["good film", "film"], convert_to_tensor=True), wanted)
    assert fastpeft.status(model).served == 2


def test_trl_by_patch(tmp_path, monkeypatch):
    """TRL makes the adapter from its ``peft_config``; no callback, nothing of ours in the trainer."""
    for package in ("trl", "datasets"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    script = (ROOT / "examples" / "sft_trainer.py").read_text()
    plain = re.sub(r"\n    callbacks=.*|import fastpeft\n|print\(fastpeft.*", "", script)
    assert "fastpeft" not in plain.split("trainer = ")[1].split("#")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sft.py"])
    found = {"__name__": "__main__"}
    with fastpeft.patch() as patched:
        exec(compile(plain, "sft.py", "exec"), found)
    assert patched.changed == 14 and not fastpeft.status(found["trainer"]).left
    assert fastpeft.status(found["trainer"]).served >= 140
