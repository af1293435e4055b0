"""What has happened: `status` counts calls served and left; warnings say once what a report did not."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import types
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="peft is not installed")

from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from peft.tuners.lora.layer import Linear as PeftLinear

import fastpeft
from fastpeft.integrations.peft import calls, kinds
from fastpeft.integrations.peft.kind import Accelerated, Kind
from peft_cases import Toy, batch, lora_layers, toy


@pytest.fixture
def said(recwarn):
    """The warnings of this package, as they come."""

    def texts():
        found = [str(each.message) for each in recwarn if str(each.message).startswith("fastpeft")]
        recwarn.clear()
        return found

    warnings.simplefilter("always")
    return texts


def test_counts(said):
    model = toy()
    x = batch()["x"]
    assert fastpeft.accelerate(model).changed == 3 and not said()
    for _ in range(2):
        model(x).sum().backward()
    with model.disable_adapter():
        model(x)
        model(x)
    lora_layers(model)[0].base_layer.register_forward_hook(lambda *_: None)
    model(x)
    found = fastpeft.status(model)
    assert found.served == 8 and found.left == {"adapters are disabled": 6, "base_layer has hooks": 1}
    name = "base_model.model.lin0"
    assert found.layers[name].served == 2
    assert found.layers[name].left == {"adapters are disabled": 2, "base_layer has hooks": 1}
    assert not found.idle and not found.others
    assert str(fastpeft.status(model)) == repr(found), "reading changes nothing"
    assert str(found).splitlines()[0] == "fastpeft: 8 calls served, 7 left to PEFT, in 3 layers"
    assert [each.split(" (said once")[0] for each in said()] == [
        f"fastpeft: {name}: a call was left to PEFT's own forward: adapters are disabled",
        f"fastpeft: {name}: a call was left to PEFT's own forward: base_layer has hooks",
    ]
    fastpeft.restore(model)
    model(x)
    assert not fastpeft.status(model).layers and len(fastpeft.status(model).others) == 3


def test_what_the_report_says_is_not_said_again(said):
    model = get_peft_model(Toy(), LoraConfig(target_modules=["lin0"]))
    model.add_adapter("other", LoraConfig(target_modules=["conv"], use_dora=True))
    model.base_model.set_adapter(["default", "other"])
    report = fastpeft.accelerate(model)
    assert report.skipped == {"base_model.model.conv": "variant Dora"} and repr(report) == str(report)
    model(batch()["x"])
    found = fastpeft.status(model)
    assert found.served == 1 and found.left == {"variant Dora": 1} and not said()


def test_idle_and_uncounted_layers():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.unused, self.emb = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(4, 4)

        def forward(self, x):
            return self.lin(self.emb(x))

    model = get_peft_model(Half(), LoraConfig(target_modules=["lin", "unused", "emb"]))
    fastpeft.accelerate(model)
    model(torch.tensor([1, 2]))
    found = fastpeft.status(model)
    assert found.idle == ["base_model.model.unused"] and found.served == 1
    assert found.others == {"base_model.model.emb": "lora.Embedding is not PEFT's lora.Linear"}
    assert "1  layers without a counted call" in str(found) and "calls not counted: lora.Embedding" in str(found)


def test_nothing_found_is_said(said, monkeypatch):
    fastpeft.accelerate(Toy())
    assert said() == ["fastpeft: nothing to accelerate: no PEFT layers"]
    model = toy()
    with monkeypatch.context() as patch:
        patch.setattr(peft, "__version__", "0.99")
        fastpeft.accelerate(model)
        (text,) = said()
        assert "0 of 3" in text and "peft 0.99 is outside the tested range" in text
    fastpeft.accelerate(model)
    assert not said()
    fastpeft.accelerate(model)
    (text,) = said()
    assert "3 of 3" in text and "nothing new" in text


def test_threads():
    layer = lora_layers(toy())[0]
    fastpeft.accelerate(layer)
    x, n = torch.randn(2, 20), 300
    interval = sys.getswitchinterval()

    def run():
        with torch.no_grad():
            for _ in range(n):
                layer(x)

    threads = [threading.Thread(target=run) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            assert fastpeft.status(layer).served <= 4 * n
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert fastpeft.status(layer).served == 4 * n


def test_copies_count_anew_and_leave_nothing(said):
    layer = lora_layers(toy())[0]
    before = dict(vars(layer))
    fastpeft.accelerate(layer)
    layer(torch.randn(2, 20))
    assert dict(vars(layer)) == before, "nothing on the instance"
    layer.enable_adapters(False)
    layer(torch.randn(2, 20))
    assert len(said()) == 1
    twins = [copy.deepcopy(layer), copy.copy(layer)]
    for twin in twins:
        assert fastpeft.status(twin).served == 0
        twin(torch.randn(2, 20))
        assert fastpeft.status(twin).left == {"adapters are disabled": 1}
    assert not said(), "the user of the copy has been told"
    assert type(pickle.loads(pickle.dumps(layer))) is PeftLinear
    keys = {id(each) for each in (layer, *twins)}
    assert keys <= calls.RECORDS.keys()
    del layer, twins, twin
    assert not keys & calls.RECORDS.keys()


def test_compiled_calls_are_told_apart(said):
    model = toy()
    fastpeft.accelerate(model)
    x = batch()["x"]
    before = fastpeft.status(model).graphs
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        compiled(x)
    found = fastpeft.status(model)
    assert found.served == 0 and found.idle == list(found.layers)
    assert found.graphs[0] >= before[0] + 3 and found.graphs[1] == before[1]
    assert "torch.compile traced" in str(found) and not said()


def test_pipelines_and_trainers():
    unet, text = toy(), toy()
    pipeline = types.SimpleNamespace(components={"unet": unet, "text_encoder": text, "scheduler": object()})
    report = fastpeft.accelerate(pipeline)
    assert report.changed == 6 and report.accelerated[0] == "unet.base_model.model.lin0"
    text(batch()["x"])
    assert fastpeft.status(pipeline).served == 3
    assert fastpeft.restore(pipeline) == 6
    trainer = types.SimpleNamespace(model=unet)
    assert fastpeft.accelerate(trainer).accelerated[0] == "model.base_model.model.lin0"
    assert fastpeft.restore(trainer) == 3
    for op in (fastpeft.accelerate, fastpeft.restore, fastpeft.status):
        with pytest.raises(TypeError, match=rf"^{op.__name__}: .*got SimpleNamespace, which holds these: left, right$"):
            op(types.SimpleNamespace(left=unet, right=text, n=3))


def test_without_kernels_peft_stays():
    """Only eager could serve: it takes up to 2.3 times PEFT's time. Asked for, it serves."""
    code = (
        "import sys; sys.modules['fastpeft._C'] = None\n"
        "import torch, fastpeft; from peft import LoraConfig, get_peft_model\n"
        "model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=['0']))\n"
        "print(fastpeft.accelerate(model)); model(torch.randn(2, 8)); print(fastpeft.status(model).served)"
    )
    for backend, lines in (("", ["fastpeft: 0 of 1", "only the eager reference can serve on cpu"]), ("eager", [])):
        env = {**os.environ, "FASTPEFT_BACKEND": backend, "TRITON_INTERPRET": "0"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        assert all(line in done.stdout for line in lines) and done.stdout.split()[-1] == ("0" if lines else "1")


def test_a_kind_is_one_object(monkeypatch):
    """A new kind: one object in `KINDS`, and accelerate, report, status and restore know it."""

    class AcceleratedEmbedding(Accelerated):
        def _served(self, x, args, kwargs):
            return torch.full((*x.shape, 4), 7.0) if not (args or kwargs) else None

    class EmbeddingKind(Kind):
        mixin = AcceleratedEmbedding
        launcher = "lora_linear_fwd"

        def peft_class(self):
            return PeftEmbedding

        def adopt(self, layer):
            return None

        def reason(self, layer, x, args, kwargs):
            return "extra arguments" if args or kwargs else None

    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, EmbeddingKind()))
    model = get_peft_model(nn.Sequential(nn.Embedding(5, 4)), LoraConfig(target_modules=["0"]))
    assert fastpeft.accelerate(model).accelerated == ["base_model.model.0"]
    assert (model(torch.tensor([1])) == 7).all() and fastpeft.status(model).served == 1
    assert fastpeft.restore(model) == 1 and type(model.base_model.model[0]) is PeftEmbedding
    assert not (model(torch.tensor([1])) == 7).any()
    assert {kind.peft_class() for kind in kinds.KINDS} >= {PeftLinear}
