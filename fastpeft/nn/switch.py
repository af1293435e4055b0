"""Every LoRA module of a model on, off, or off within a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastpeft.nn.factors.base import LoRAModule
from fastpeft.nn.layers.parametrization import LoRAParametrization
from fastpeft.nn.layers.stack import AdapterStack
from fastpeft.nn.merge import Mergeable
from fastpeft.ops import _checks


def _modules(module: nn.Module) -> list[LoRAModule | LoRAParametrization]:
    _checks.require_dtype(isinstance(module, nn.Module), "lora", "module", "be an nn.Module", type(module).__name__)
    return [child for child in module.modules() if isinstance(child, (LoRAModule, LoRAParametrization))]


def enable_lora(module: nn.Module) -> int:
    """``enable()`` on every LoRA module and parametrization in ``module``; returns how many there are.

    Not on an `Adapter` or a prompt, which have switches of their own.
    Raises     TypeError: not a module.
    """
    children = _modules(module)
    for child in children:
        child.enable()
    return len(children)


def _merged_stacks(module: nn.Module) -> list[AdapterStack]:
    return [child for child in module.modules() if isinstance(child, AdapterStack) and child.merged]


def disable_lora(module: nn.Module) -> int:
    """``disable()`` on every LoRA module and parametrization in ``module``; returns how many there are.

    What is merged is unmerged. Not on an `Adapter` or a prompt, which have switches of their own.
    Raises     TypeError: not a module.
    """
    children = _modules(module)
    for stack in _merged_stacks(module):
        stack.unmerge()
    for child in children:
        child.disable()
    return len(children)


@contextmanager
def lora_disabled(module: nn.Module) -> Iterator[None]:
    """The base model within the block; after it, each LoRA module is enabled and merged as it was.

    Raises     TypeError: not a module.
    """
    children, stacks = _modules(module), _merged_stacks(module)
    for stack in stacks:
        stack.unmerge()
    enabled = [child for child in children if child.enabled]
    merged = [(child, child.has_backup) for child in children if isinstance(child, Mergeable) and child.merged]
    try:
        disable_lora(module)
        yield
    finally:
        for child in enabled:
            child.enable()
        for mergeable, backup in merged:
            if not mergeable.merged:
                mergeable.merge(keep_backup=backup)
        for stack in stacks:
            stack.merge()
