"""For tests/ and bench/ only: the error budget, torch.empty filled with NaN, seeds and the backends that can serve."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fastpeft import dispatch

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 2.0**-52}


def error(value: torch.Tensor, gold: torch.Tensor) -> float:
    """The largest absolute difference, in fp64; infinite where a NaN or a shape differs."""
    if value.shape != gold.shape:
        return float("inf")
    if gold.numel() == 0:
        return 0.0
    difference = (value.double() - gold.double()).abs().max().item()
    return difference if difference == difference else float("inf")


def assert_within_budget(
    ours: torch.Tensor, peer: torch.Tensor, gold: torch.Tensor, dtype: torch.dtype, name: str = "value"
) -> None:
    """``err(ours, gold) <= 2 · (err(peer, gold) + eps(dtype) · max|gold|)``.

    gold is the reference in fp64 or fp32, peer the reference in the tested dtype.
    """
    scale = gold.abs().max().item() if gold.numel() else 0.0
    budget = 2.0 * (error(peer, gold) + EPS[dtype] * scale)
    measured = error(ours, gold)
    assert measured <= budget, (
        f"{name}: error {measured:.3e} is over the budget of {budget:.3e} (max|gold| {scale:.3e})"
    )


def assert_all_within_budget(
    ours: Mapping[str, torch.Tensor],
    peer: Mapping[str, torch.Tensor],
    gold: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    assert ours.keys() == peer.keys() == gold.keys()
    for name in gold:
        assert_within_budget(ours[name], peer[name], gold[name], dtype, name)


def seed_of(name: str) -> int:
    """A seed from a test's id, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Every torch.empty of floats holds NaN, so that an element which a kernel forgets to write shows up."""
    memory: Any = torch.utils.deterministic  # its type stubs lack the attribute set below
    before = memory.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    memory.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = before[0]
        torch.use_deterministic_algorithms(before[1], warn_only=warn)


def backends(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends that can serve here, without the reference."""
    return [name for name in dispatch.BACKENDS if name != "eager" and dispatch.unmet(op, name, device, dtype) is None]
