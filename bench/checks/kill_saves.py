"""Processes that save adapters again and again, each killed at a random moment: the old file or the new one is whole.

python bench kills --kills 1000

Every process writes generation after generation: PEFT's folder (every other one in shards), a file of kohya's, and the
manager's own. A generation's number is the value of every element and of lora_alpha, so that a folder with files of two
generations is seen. After each kill everything is read as another library would, without what saved it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fastpeft import EfficientFineTuningManager, load_adapter, save_adapter

_LAYERS = 6


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(_LAYERS)))


def adapted() -> EfficientFineTuningManager:
    return EfficientFineTuningManager(base()).apply_lora([str(i) for i in range(_LAYERS)], rank=8)


@torch.no_grad()
def write(manager: EfficientFineTuningManager, root: Path, generation: int) -> None:
    """One generation of every file."""
    for parameter in manager.get_trainable_parameters():
        parameter.fill_(generation)
    for entry in manager.entries:
        entry.module.scaling = generation / 8
    save_adapter(manager, root / "folder", max_shard_size="8KB" if generation % 2 else None)
    save_adapter(manager, root / "kohya.safetensors", "kohya")
    manager.save_efficient_weights(root / "own.safetensors")


def whole(root: Path) -> list[int]:
    """The generation of each file, every one of them whole.

    Raises     AssertionError: a file that is damaged, or of two generations.
    """
    folder = root / "folder"
    names = sorted(path.name for path in folder.iterdir())
    index = folder / "adapter_model.safetensors.index.json"
    wanted = {"adapter_config.json", "adapter_model.safetensors"}
    if index.exists():
        wanted = {"adapter_config.json", index.name, *json.loads(index.read_text())["weight_map"].values()}
    assert set(names) == wanted, names
    generations = [json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]]
    tensors = {
        key: value for name in names if name.endswith(".safetensors") for key, value in load_file(folder / name).items()
    }
    assert len(tensors) == 2 * _LAYERS, sorted(tensors)
    generations += [
        _one(tensors),
        _one(load_file(root / "kohya.safetensors")),
        _one(load_file(root / "own.safetensors")),
    ]
    assert generations[0] == generations[1], generations
    load_adapter(base(), folder)
    load_adapter(base(), root / "kohya.safetensors")
    return [int(each) for each in generations[1:]]


def _one(tensors: dict[str, torch.Tensor]) -> float:
    values = {each for value in tensors.values() for each in value.flatten().tolist()}
    assert len(values) == 1, sorted(values)[:5]
    return values.pop()


def _until_killed(root: Path, generation: int, ready: int) -> None:
    manager = adapted()
    os.write(ready, b"1")
    while True:
        generation += 1
        write(manager, root, generation)


def run(kills: int, root: Path, seed: int = 0, longest: float = 0.15) -> dict[str, Any]:
    """Kill so many processes; what they left is checked after each.

    longest    seconds that a process saves before it is killed, at most
    Returns    kills, how many left something half written beside the files, and the last generation
    """
    chance = random.Random(seed)
    write(adapted(), root, 1)
    last, amid = [1, 1, 1], 0
    for _ in range(kills):
        heard, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _until_killed(root, max(last), told)
            finally:
                os._exit(1)
        os.close(told)
        os.read(heard, 1)
        os.close(heard)
        time.sleep(chance.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "a save failed before it was killed"
        now = whole(root)
        assert all(new >= old for new, old in zip(now, last, strict=True)), (last, now)
        amid += any(".part" in path.name for path in root.iterdir())
        for path in root.glob(".*.part*"):  # the next save would wait a minute with this
            _remove(path)
        last = now
    return {"kills": kills, "amid a save": amid, "generation": max(last)}


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        begun = time.monotonic()
        found = run(args.kills, Path(root), args.seed)
        print(json.dumps({**found, "seconds": round(time.monotonic() - begun, 1)}), "every file was whole")
