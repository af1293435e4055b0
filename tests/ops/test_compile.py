"""Under torch.compile and torch.export: how many graphs a scale that changes takes, and what an exported program needs."""

import importlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cases import normal
from fastpeft.integrations import accelerate
from fastpeft.nn import LoRALayer, LoRALinear, QLoRALinear

VALUES = 20
MODULES = {
    "LoRALinear": lambda: LoRALinear(torch.nn.Linear(64, 5), 2, dropout=0.0),
    "LoRALayer": lambda: LoRALayer(64, 5, 2, dropout=0.0),
    "QLoRALinear": lambda: QLoRALinear(torch.nn.Linear(64, 5), 2, dropout=0.0),
}


def graphs(module, x, rescale):
    """How many graphs twenty values take; each with the result and the gradients of an eager call."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    leaves = [x.requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]
    for value in range(VALUES):
        rescale(0.25 + value / 16)
        found, expected = ((y, *torch.autograd.grad(y.sum(), leaves)) for y in (compiled(x), module(x)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return counter.frame_count


@pytest.mark.parametrize("name", MODULES)
def test_a_scale_that_changes(name):
    module = MODULES[name]()
    torch.nn.init.normal_(module.lora_B)
    assert graphs(module, normal(3, 64), lambda value: setattr(module, "scaling", value)) <= 2


def peft_model(kind, **config):
    pytest.importorskip("bitsandbytes" if "4bit" in kind else "peft")
    cases = importlib.import_module(kind)
    model = cases.toy(**config)
    assert not accelerate(model).skipped
    return model, cases.batch()["x"], [m for m in model.modules() if hasattr(m, "scaling")]


@pytest.mark.cpp  # where only the reference could serve, accelerate leaves a layer to PEFT
@pytest.mark.parametrize("kind", ["peft_cases", "peft_4bit_cases"])
def test_a_scaling_of_peft_that_changes(kind):
    model, x, layers = peft_model(kind)

    def rescale(value):
        for layer in layers:
            layer.scaling["default"] = value

    assert graphs(model, x, rescale) <= 2


# bitsandbytes' own forward, to which a layer of 4 bits is left, cannot be traced with strict=False.
@pytest.mark.cpp
@pytest.mark.parametrize(("kind", "strict"), [("peft_cases", False), ("peft_cases", True), ("peft_4bit_cases", True)])
def test_an_exported_model_needs_no_fastpeft(kind, strict):
    model, x, _ = peft_model(kind)
    model.eval()
    program = torch.export.export(model, (x,), strict=strict)
    assert "ops.fastpeft" not in program.graph_module.print_readable(print_output=False)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)
