"""Two processes train as one does: DDP and FSDP2 over our own layers, LoRA and in 4 bits, and over accelerated PEFT models.

A checkpoint that FSDP2's processes write is read by one process and by another number of them, which train on as the
uninterrupted run.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import fastpeft

WORLD, OTHER_WORLD, STEPS, SAVED, WIDTH, BATCH = 2, 3, 20, 10, 64, 6
KINDS = ("lora", "qlora", "peft", "peft4bit")
NEEDS = {"peft": ("peft",), "peft4bit": ("peft", "bitsandbytes")}
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)
        self.config = SimpleNamespace(to_dict=lambda: {}, model_type="net", get=lambda *_: None)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def quantised(model):
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "head":
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, True, torch.float32, False, "nf4", torch.float32
            )
            new.load_state_dict(module.state_dict())
            model.set_submodule(name, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def build(kind):
    """(the model, its blocks): adapters on up and down that are not at the identity, no dropout."""
    torch.manual_seed(0)
    model = Net()
    blocks = list(model.blocks)
    if kind.startswith("peft"):
        from peft import LoraConfig, get_peft_model

        model = quantised(model) if kind == "peft4bit" else model
        config = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False, modules_to_save=["head"])
        model = get_peft_model(model, config)
        assert len(fastpeft.accelerate(model).accelerated) == 4
        return model, blocks
    manager = fastpeft.EfficientFineTuningManager(model)
    apply = manager.apply_qlora if kind == "qlora" else manager.apply_lora
    apply(target_modules=["up", "down"], rank=4, dropout_probability=0.0)
    model.head.requires_grad_(True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model, blocks


def engine_of(name, kind):
    model, blocks = build(kind)
    if name == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if name == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02, momentum=0.9)


def share(x, rank, world):
    return x[rank * BATCH // world : (rank + 1) * BATCH // world]


def train(model, optimizer, steps, rank=0, world=1):
    """The mean loss of every step over all processes, each of which has its share of the batch."""
    losses = []
    for step in steps:
        x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step % 2))
        y = x[:, :3].argmax(1)
        loss = nn.functional.cross_entropy(model(share(x, rank, world)), share(y, rank, world))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        if world > 1:
            distributed.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def state_of(model, optimizer):
    trained = get_model_state_dict(model, options=TRAINED)
    # bitsandbytes writes the scales of a frozen weight in one process, and none under FSDP2.
    trained = {name: value for name, value in trained.items() if "base_layer" not in name}
    return {
        "model": trained,
        "optimizer": get_optimizer_state_dict(model, optimizer, options=TRAINED),
    }


def resume(kind, folder, rank=0, world=1):
    """A new model of ``world`` processes, from the checkpoint on."""
    model = engine_of("fsdp2" if world > 1 else "one", kind)
    optimizer = optimizer_of(model)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder, no_dist=world == 1)
    set_model_state_dict(model, state["model"], options=TRAINED)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=TRAINED)
    return train(model, optimizer, range(SAVED, STEPS), rank, world)


def start(rank, world, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store{world}", world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)


def write(rank, folder, kinds):
    start(rank, WORLD, folder)
    found = {}
    for kind in kinds:
        model = engine_of("ddp", kind)
        found["ddp", kind] = train(model, optimizer_of(model), range(STEPS), rank, WORLD)
        model = engine_of("fsdp2", kind)
        optimizer = optimizer_of(model)
        losses = train(model, optimizer, range(SAVED), rank, WORLD)
        dcp.save(state_of(model, optimizer), checkpoint_id=f"{folder}/{kind}")
        found["fsdp2", kind] = losses + train(model, optimizer, range(SAVED, STEPS), rank, WORLD)
    torch.save(found, f"{folder}/found{rank}")
    distributed.destroy_process_group()


def read(rank, folder, kinds):
    start(rank, OTHER_WORLD, folder)
    found = {kind: resume(kind, f"{folder}/{kind}", rank, OTHER_WORLD) for kind in kinds}
    torch.save(found, f"{folder}/read{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("distributed"))
    kinds = [kind for kind in KINDS if all(map(importlib.util.find_spec, NEEDS.get(kind, ())))]
    multiprocessing.spawn(write, (folder, kinds), WORLD)
    multiprocessing.spawn(read, (folder, kinds), OTHER_WORLD)
    return SimpleNamespace(
        folder=folder, two=torch.load(f"{folder}/found0"), three=torch.load(f"{folder}/read0"), kinds=kinds
    )


@pytest.fixture(scope="module")
def one():
    """kind -> the losses of one process."""
    found = {}

    def run(kind):
        if kind not in found:
            model, _ = build(kind)
            found[kind] = train(model, optimizer_of(model), range(STEPS))
        return found[kind]

    return run


def same(losses, expected):
    assert expected[-1] < 0.7 * expected[0], "it learns"
    torch.testing.assert_close(losses, expected[-len(losses) :], rtol=1e-4, atol=1e-6)


def need(kind, runs):
    if kind not in runs.kinds:
        pytest.skip(f"{' and '.join(NEEDS[kind])} must be installed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(engine, kind, runs, one):
    need(kind, runs)
    same(runs.two[engine, kind], one(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_checkpoint_in_one_process(kind, runs, one):
    need(kind, runs)
    same(resume(kind, f"{runs.folder}/{kind}"), one(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_checkpoint_in_three_processes(kind, runs, one):
    need(kind, runs)
    same(runs.three[kind], one(kind))
