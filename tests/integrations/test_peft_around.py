"""What is done to an accelerated PEFT model from outside: copies, files, hooks, compilation, transforms, sharding."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed")

from peft import LoraConfig, PeftModel, get_peft_model
from torch._dynamo.backends.debugging import aot_eager

from fastpeft.integrations import accelerate, restore
from fastpeft.integrations.peft import linear, reason
from fastpeft.integrations.peft.kind import Accelerated
from peft_cases import Toy, accelerated, batch, compare, lora_layers, run, toy


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_torch_func_steps_back():
    model = accelerated(toy())
    layer = lora_layers(model)[0]
    x = torch.randn(4, 20)
    jacobian = torch.func.vmap(torch.func.jacrev(layer))(x)
    assert jacobian.shape == (4, 24, 20)
    assert torch.jit.trace(layer, x)(x).shape == (4, 24)


def test_result_takes_an_addition_in_place():
    # PEFT's mixed models (AdaLoRA over LoRA) do it; autograd forbids it for a view that a custom function returned.
    layer = lora_layers(accelerated(toy()))[0]
    y = layer(batch()["x"])
    y += 1.0
    y.sum().backward()
    assert layer.lora_A["default"].weight.grad is not None


def test_weights_that_are_views_of_one_buffer():
    # FSDP1 with use_orig_params and flat-parameter optimizers: every weight has an offset into one storage.
    def state(model):
        parameters = dict(model.named_parameters())
        dtype = next(iter(parameters.values())).dtype
        flat = torch.cat([torch.full((3,), 1e20, dtype=dtype), *(w.detach().flatten() for w in parameters.values())])
        offset = 3
        for w in parameters.values():
            w.data = flat[offset : offset + w.numel()].view_as(w)
            offset += w.numel()

    compare(toy(lora_bias=True), batch(), state=state, fast=3)


def test_unload():
    for method in ("unload", "merge_and_unload"):
        model = toy()
        x = batch()["x"]
        wanted = getattr(copy.deepcopy(model), method)()(x)
        plain = getattr(accelerated(model), method)()
        assert not lora_layers(plain)
        torch.testing.assert_close(plain(x), wanted, rtol=0, atol=0)


def test_saved_bytes(tmp_path):
    model = toy(lora_bias=True, modules_to_save=["head"])
    model.save_pretrained(tmp_path / "plain")
    keys = list(model.state_dict())
    accelerate(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "ours")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
    again = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "ours")
    torch.testing.assert_close(again(batch()["x"]), model(batch()["x"]))


def test_copies():
    model = accelerated(toy())
    x = batch()["x"]
    deep = copy.deepcopy(model)
    assert len(accelerate(deep).accelerated) == 3 and accelerate(deep).changed == 0
    torch.testing.assert_close(deep(x), model(x), rtol=0, atol=0)
    shallow = copy.copy(lora_layers(model)[0])
    assert reason(shallow) is None
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(model, protocol)
        assert b"fastpeft" not in data
        loaded = pickle.loads(data)
        assert {type(layer) for layer in lora_layers(loaded)} == {peft.tuners.lora.layer.Linear}
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compile(p):
    model = accelerated(toy(lora_dropout=p, lora_bias=True))
    x = batch()["x"]
    wanted = grads(model, x) if p == 0 else {}
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    found = grads(torch.compile(model, backend=counting, fullgraph=True), x)
    assert found and len(graphs) == 1
    for name, value in wanted.items():
        torch.testing.assert_close(found["_orig_mod." + name], value)


def grads(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def test_compiled_model_follows_the_state():
    model = accelerated(toy(adapters=2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = batch()["x"]
    for state in (lambda: None, lambda: model.set_adapter("second"), lambda: model.base_model.disable_adapter_layers()):
        state()
        torch.testing.assert_close(compiled(x), model(x))


def hook_each(role):
    def state(model):
        for layer in lora_layers(model):
            part = layer.base_layer if role == "base_layer" else getattr(layer, role)["default"]
            part.register_forward_hook(lambda module, args, y: y * 1.5)

    return state


@pytest.mark.parametrize("role", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
def test_hooks_on_a_part(role):
    compare(toy(), batch(), state=hook_each(role), fast=0)


def test_hooks_on_the_layer():
    state = lambda m: [x.register_forward_hook(lambda module, args, y: y * 1.5) for x in lora_layers(m)]  # noqa: E731
    compare(toy(), batch(), state=state, fast=3)


def test_global_hook():
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        model = accelerated(toy())
        model(batch()["x"])
        assert lora_layers(model)[0].lora_A["default"] in seen
        assert reason(lora_layers(model)[0]) == "global module hooks are registered"
    finally:
        handle.remove()


def test_instance_forward_of_a_part():
    def state(model):
        for layer in lora_layers(model):
            base = layer.base_layer
            base.forward = lambda x, old=base.forward: old(x) + 1.0

    compare(toy(), batch(), state=state, call=None, fast=0)


def test_parametrised_base():
    state = lambda m: [torch.nn.utils.parametrizations.weight_norm(x.base_layer) for x in lora_layers(m)]  # noqa: E731
    compare(
        get_peft_model(Toy(), LoraConfig(target_modules=["lin0"], init_lora_weights=False)),
        batch(),
        state=state,
        fast=0,
    )


def test_restored():
    model = toy()
    wanted = model(batch()["x"])
    accelerate(model)
    assert restore(model) == 3
    torch.testing.assert_close(model(batch()["x"]), wanted, rtol=0, atol=0)
    assert not any(isinstance(module, Accelerated) for module in model.modules())


def test_fsdp2(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for each in (True, False):
            model, plain = toy(), toy()
            plain.load_state_dict(model.state_dict())
            accelerate(model)
            for layer in lora_layers(model) if each else ():
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert "sharded" in reason(lora_layers(model)[0])
            calls = []
            operator = linear.lora_linear
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(linear, "lora_linear", lambda *a, op=operator, c=calls, **k: c.append(1) or op(*a, **k))
                found = run(model, {"x": torch.ones(3, 20)}, None, 3)
            assert len(calls) == 3, "FSDP2 gathers plain tensors for the call"
            for name, value in run(plain, {"x": torch.ones(3, 20)}, None, 3).items():
                ours = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
                torch.testing.assert_close(ours, value)
            # The class that FSDP2 has put on top stays.
            kinds = [type(layer).__name__ for layer in lora_layers(model)]
            assert restore(model) == 3
            assert [type(layer).__name__ for layer in lora_layers(model)] == kinds
            assert not any(isinstance(layer, Accelerated) for layer in lora_layers(model))
            run(model, {"x": torch.ones(3, 20)}, None, 3)
    finally:
        distributed.destroy_process_group()
