"""Registration of the raw operators ``torch.ops.fastpeft.<op>(..., backend)``, and the one way in which they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastpeft import dispatch

_LIBRARY = torch.library.Library("fastpeft", "DEF")


def register(op: str, arguments: str, returns: str, fake: Callable[..., Any]) -> None:
    """Define ``op``: its launcher's arguments and a backend's name; ``fake`` takes the same and gives empty outputs."""
    _LIBRARY.define(f"{op}({arguments}, str backend) -> {returns}", tags=(torch.Tag.needs_fixed_stride_order,))

    def implementation(*args: Any) -> Any:
        *rest, backend = args
        return dispatch.load(op, backend)(*rest)

    _LIBRARY.impl(op, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpeft::{op}", fake, lib=_LIBRARY)


def call(op: str, backend: str, *args: Any) -> Any:
    """Run a raw operator: through the dispatcher where something watches it, else the launcher itself.

    The dispatcher with a Python implementation costs a call of a tiny layer more than all of its arithmetic; it is needed
    only to be recorded in a graph or seen by a dispatch mode (fake tensors, FLOP counters, selective checkpointing).
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return getattr(torch.ops.fastpeft, op).default(*args, backend)
    return dispatch.load(op, backend)(*args)
