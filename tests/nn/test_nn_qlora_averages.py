"""Averages of parameters and of state dicts leave QLoRALinear's packed bytes as they are."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from fastpeft.nn import QLoRALinear
from qlora_cases import fixed, same, trained

DECAYS = (0.9, 0.9995, 0.9999)  # those at which uint8(v * decay + v * (1 - decay)) is not v, for a fifth of the bytes


def every_byte():
    """A module with all values of a byte in its weight."""
    module = trained(K=64, N=64)
    with torch.no_grad():
        module.weight.copy_(torch.arange(2048, dtype=torch.uint8).view(-1, 1))
    return module


def moved(module):
    with torch.no_grad():
        module.lora_A.add_(1.0)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("make", [get_ema_avg_fn, get_ema_multi_avg_fn])
def test_averaged_model(make, decay):
    module = nn.Sequential(every_byte())
    before, name = fixed(module[0]), "avg_fn" if make is get_ema_avg_fn else "multi_avg_fn"
    average = AveragedModel(module, **{name: make(decay)})
    for _ in range(3):
        moved(module[0])
        average.update_parameters(module)
    assert same(fixed(average.module[0]), before)
    assert not torch.equal(average.module[0].lora_A, module[0].lora_A)
    x = torch.randn(3, 64)
    assert average(x).isfinite().all()


def test_swa():
    module = nn.Sequential(every_byte())
    average = AveragedModel(module)
    for _ in range(3):
        average.update_parameters(module)
    assert same(fixed(average.module[0]), fixed(module[0]))


@pytest.mark.parametrize("decay", DECAYS)
def test_average_of_state_dicts(decay):
    """Of all values, in place, as some training loops do."""
    module = every_byte()
    average, before = copy.deepcopy(module), fixed(module)
    for _ in range(3):
        moved(module)
        for kept, new in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
            kept.copy_(kept * decay + new * (1 - decay))
    after = fixed(average)
    assert torch.equal(after["weight"], before["weight"])


CHANGES = {
    "to": lambda module: module.to(torch.float16),
    "deepcopy": copy.deepcopy,
    "loaded": lambda module: (module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True), module)[1],
    "unmerged": lambda module: (module.merge(), module.unmerge(), module)[2],
    "pickled": lambda module: torch.load(io.BytesIO(saved(module)), weights_only=False),
    "meta": lambda module: (kept := module.state_dict(), module.to("meta").load_state_dict(kept, assign=True), module)[
        2
    ],
}


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_after(change):
    """Whatever has made the parameter anew."""
    module = change(every_byte())
    weight = module.weight.detach().clone()
    assert isinstance(module.weight, nn.Parameter) and not module.weight.requires_grad
    module.weight.detach().copy_(module.weight * 0.9999 + module.weight * (1 - 0.9999))
    assert torch.equal(module.weight, weight)


def test_files_hold_plain_tensors():
    state = torch.load(io.BytesIO(saved(every_byte().state_dict())), weights_only=True)
    assert all(type(value) is torch.Tensor for value in state.values())
    assert type(copy.deepcopy(QLoRALinear(8, 8).state_dict())["weight"]) is torch.Tensor


def test_sharded(tmp_path):
    """What the docstring says of FSDP1 and FSDP2: the same output, gradients of the adapter."""
    distributed = pytest.importorskip("torch.distributed", reason="torch without torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        cpu, x = torch.device("cpu"), torch.randn(3, 32)

        def sharded(wrap):
            model = nn.Sequential(trained().eval())
            y = model(x)
            weight = model[0].weight
            wrapped = wrap(model, weight)
            assert torch.equal(wrapped(x), y)
            wrapped(x).sum().backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

        one = {"device_id": cpu, "use_orig_params": True}
        sharded(lambda model, weight: FullyShardedDataParallel(model, ignored_states=[weight], **one))
        mesh = distributed.init_device_mesh("cpu", (1,))
        sharded(lambda model, _: fully_shard(model, mesh=mesh))
        with pytest.raises(ValueError, match="Cannot flatten integer"):
            sharded(lambda model, _: FullyShardedDataParallel(model, **one))
    finally:
        distributed.destroy_process_group()
