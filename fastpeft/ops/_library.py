"""Registration of the raw operators ``torch.ops.fastpeft.<op>(..., backend)``, and the one way to call them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


_watchers: list[Callable[[str, str, tuple[Any, ...]], None]] = []


@contextmanager
def watching(seen: Callable[[str, str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Tell ``seen`` the op, the backend and the arguments of every raw operator called inside."""
    _watchers.append(seen)
    try:
        yield
    finally:
        _watchers.remove(seen)


def call(op: str, backend: str, *args: Any) -> Any:
    """Run a raw operator: through the dispatcher where something watches it, else the launcher itself.

    The dispatcher with a Python implementation costs a tiny layer more than all of its arithmetic; it is needed
    only to be recorded in a graph, seen by a dispatch mode (fake tensors, FLOP counters, selective checkpointing), or
    answered with shapes alone on the meta device.
    """
    for seen in _watchers:
        seen(op, backend, args)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or args[0].is_meta:
        return getattr(torch.ops.fastpeft, op).default(*args, backend)
    return dispatch.load(op, backend)(*args)
