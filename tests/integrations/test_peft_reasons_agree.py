"""``reason`` words what the accelerated forward does: a call is computed by our operator exactly where it gives none.

For each kind of layer, with one or two changes of its state and of the input.
"""

from contextlib import nullcontext, suppress
from unittest import mock

import pytest
import torch

pytest.importorskip("peft", reason="the integration with PEFT")
pytest.importorskip("bitsandbytes", reason="the kind of 4-bit layers")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fastpeft
import peft_4bit_cases
import peft_cases
from fastpeft.integrations.peft.kind import Accelerated
from fastpeft.integrations.peft.report import reason
from fastpeft.ops import _library

OURS = {"lora_linear", "lora_adapter", "linear4bit", "linear4bit_lora"}


class Sub(nn.Parameter):
    """A parameter of another class."""


def put(module, name, value):
    module._parameters[name] = value


def set_dtype(dtype):
    return lambda layer: put(
        layer.lora_A["default"], "weight", nn.Parameter(layer.lora_A["default"].weight.detach().to(dtype))
    )


def repacked(layer):
    state = getattr(layer.base_layer.weight, "quant_state", None)
    if state is not None:
        state.packing_format_for_cpu = True


STATES = {
    "eval": lambda layer: layer.eval(),
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "two adapters": lambda layer: layer.set_adapter(["default", "second"]),
    "no adapter": lambda layer: setattr(layer, "_active_adapter", []),
    "an adapter of another layer": lambda layer: setattr(layer, "_active_adapter", ["elsewhere"]),
    "hook on lora_A": lambda layer: layer.lora_A["default"].register_forward_hook(lambda *_: None),
    "hook on lora_dropout": lambda layer: layer.lora_dropout["default"].register_forward_pre_hook(lambda *_: None),
    "hook on the base": lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
    "hook on the layer": lambda layer: layer.register_forward_hook(lambda *_: None),
    "lora_B is replaced": lambda layer: layer.lora_B.update({"default": nn.Sequential(layer.lora_B["default"])}),
    "bias on lora_A": lambda layer: put(layer.lora_A["default"], "bias", nn.Parameter(torch.ones(4))),
    "bias on lora_B": lambda layer: put(layer.lora_B["default"], "bias", nn.Parameter(torch.ones(layer.lora_B["default"].out_features))),
    "dropout": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.3)}),
    "another dropout": lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.3)}),
    "parameter subclass": lambda layer: put(layer.lora_A["default"], "weight", Sub(layer.lora_A["default"].weight.detach())),
    "base parametrised": lambda layer: nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity(), unsafe=True),
    "lora_A parametrised": lambda layer: nn.utils.parametrize.register_parametrization(layer.lora_A["default"], "weight", nn.Identity()),
    "base's forward in the instance": lambda layer: setattr(layer.base_layer, "forward", lambda x: x.new_zeros(*x.shape[:-1], layer.out_features)),
    "A's forward in the instance": lambda layer: setattr(layer.lora_A["default"], "forward", lambda x: x.new_zeros(*x.shape[:-1], 4)),
    "double A": set_dtype(torch.float64),
    "bf16 A": set_dtype(torch.bfloat16),
    "meta A": lambda layer: put(layer.lora_A["default"], "weight", nn.Parameter(layer.lora_A["default"].weight.detach().to("meta"))),
    "no cast": lambda layer: setattr(layer, "cast_input_dtype_enabled", False),
    "tensor scaling": lambda layer: layer.scaling.update({"default": torch.tensor(0.5)}),
    "repacked": repacked,
    "frozen": lambda layer: layer.requires_grad_(False),
}  # fmt: skip
INPUTS = {
    "plain": lambda x: x,
    "rows": lambda x: x.flatten(0, -2),
    "a vector": lambda x: x[0, 0],
    "transposed": lambda x: x.transpose(0, 1),
    "empty": lambda x: x[:0],
    "bf16": lambda x: x.bfloat16(),
    "double": lambda x: x.double(),
    "int64": lambda x: x.long(),
    "nested": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "subclass": lambda x: Sub(x),
    "narrow": lambda x: x[..., :-1],
    "meta": lambda x: x.to("meta"),
}
CONTEXTS = {
    "none": nullcontext,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast elsewhere": lambda: torch.autocast("cuda", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
}


def linear_layer():
    model = fastpeft_model(peft_cases)
    return model.get_submodule("base_model.model.lin0"), peft_cases.batch()["x"]


def fourbit_layer():
    model = fastpeft_model(peft_4bit_cases)
    return model.get_submodule("base_model.model.lin0"), peft_4bit_cases.batch()["x"]


def fastpeft_model(cases):
    torch.manual_seed(0)
    model = cases.toy(2)
    fastpeft.accelerate(model)
    return model


def check(make, states, context, kind):
    layer, x = make()
    for state in states:
        with suppress(Exception):  # two changes may exclude one another
            STATES[state](layer)
    x, told, left = INPUTS[kind](x), [], []
    # PEFT's own forward is not run: of some of these calls it makes an end of the process.
    with (
        CONTEXTS[context](),
        _library.watching(lambda call: told.append(call.op)),
        mock.patch.object(Accelerated, "_plain", lambda *_: left.append(True)),
    ):
        why, served = reason(layer, x), False
        try:
            layer(x)
            served = bool(OURS & set(told)) and not left
        except ValueError as error:  # an x of another width: ours refuses it in words, as PEFT's would in torch's
            served = str(error).startswith("lora_linear: x must have shape")
            assert served, error
    assert served == (why is None), (
        f"{'served' if served else 'left to PEFT'}, reason {why!r}: {states} {context} {kind}"
    )
    assert served or left


quick = settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
calls = given(st.lists(st.sampled_from(sorted(STATES)), max_size=2, unique=True), st.sampled_from(sorted(CONTEXTS)), st.sampled_from(sorted(INPUTS)))  # fmt: skip


@pytest.mark.parametrize("make", [linear_layer, fourbit_layer])
@quick
@calls
def test_pairs(make, states, context, given):
    check(make, states, context, given)


@pytest.mark.parametrize("make", [linear_layer, fourbit_layer])
@pytest.mark.parametrize("state", STATES)
def test_each_state(make, state):
    check(make, [state], "none", "plain")


@pytest.mark.parametrize("make", [linear_layer, fourbit_layer])
@pytest.mark.parametrize("given", INPUTS)
def test_each_input(make, given):
    for context in CONTEXTS:
        check(make, [], context, given)
