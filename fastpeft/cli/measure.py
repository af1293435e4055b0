"""Memory of a model in training: bytes kept for backward, the peak of a step."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.cli.data import Batch


def precision(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Autocast to bf16 if requested; otherwise the weights' own fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def kept_for_backward(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd holds between ``forward()`` and its backward, beyond the model's weights and buffers.

    Each storage counts once and whole, however many views of it are kept, because that is what stays allocated.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}  # keeps each tensor alive, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in held.items() if address not in own)


def peak_allocated(device: torch.device, run: Callable[[], Any]) -> int:
    """The most bytes of tensors that ``run()`` has allocated at one time, beyond what was allocated before.

    On a GPU the allocator reports this; on a CPU the profiler records each tensor that is made and freed.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        run()
        torch.accelerator.synchronize(device)
        return int(torch.accelerator.max_memory_allocated(device)) - int(before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise every profile writes two lines to standard error
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    changes = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda each: each.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def forget_peak() -> None:
    """Return freed memory to the system and reset the process's peak, where possible (Linux with glibc).

    malloc keeps the pages of freed weights of a few MB: they would count against a model that has freed them.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int | None:
    """Peak resident bytes of this process, since forget_peak if that works; None if the system does not tell.

    getrusage will not do: on Linux it starts from the peak of the parent process.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None
