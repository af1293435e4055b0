"""Registration of the raw operators ``torch.ops.fastpeft.<op>(..., backend)``, the one way to call them, and the
description of each call for ``fastpeft.explain``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastpeft import dispatch
from fastpeft.ops import _flops

_LIBRARY = torch.library.Library("fastpeft", "DEF")


@dataclass(frozen=True)
class Call:
    """One kind of operator call: what it computes, on what, by which backend and strategy."""

    op: str
    shape: tuple[tuple[str, int], ...]
    dtype: str
    p: float
    flop: int
    elements: int
    backend: str = ""
    strategy: str = ""
    count: int = 1

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={value}" for name, value in self.shape)
        dropout = f", dropout {self.p}" if self.p else ""
        times = f" x {self.count}" if self.count > 1 else ""
        return (
            f"{self.op}{times}: {sizes}, {self.dtype}{dropout}\n"
            f"  backend {self.backend}, strategy {self.strategy}\n"
            f"  forward {self.flop / 1e9:.3f} GFLOP, at least {self.elements / 1e6:.3f} M elements of x, W and y moved"
        )


def described(
    op: str, x: torch.Tensor, *, flop: int, elements: int, p: float = 0.0, strategy: str = "", **sizes: int
) -> Call:
    """The value of an operator's ``describe``: ``flop`` of the call, ``elements`` of its large operands, and its sizes.

    strategy    added to the backend's own words
    """
    dtype = str(x.dtype).removeprefix("torch.")
    return Call(op, tuple(sizes.items()), dtype, p, flop, elements, strategy=strategy)


def described_linear(op: str, x: torch.Tensor, N: int, rank: int, p: float, *, strategy: str = "") -> Call:
    """``described`` for a base product x [M, K] Wᵀ and the adapter beside it."""
    M, K = x.shape
    flop, elements = 2 * M * N * K + 2 * M * rank * (K + N), M * K + N * K + M * N
    return described(op, x, flop=flop, elements=elements, p=p, strategy=strategy, M=M, K=K, N=N, rank=rank)


Describe = Callable[..., Call]
_described: dict[str, Describe] = {}


def register(
    op: str,
    fake: Callable[..., Any],
    *,
    mutates: Sequence[str] = (),
    describe: Describe | None = None,
    flops: Callable[..., int] | None = None,
) -> None:
    """Define the raw operator ``op``, whose row ``dispatch.ROWS`` holds.

    fake       takes the launcher's arguments and then the backend's name, and returns empty outputs; its annotations
               become the operator's schema, so they use only types that ``torch.library.infer_schema`` knows
    mutates    the arguments that the launcher writes
    describe   takes the launcher's arguments and tells ``fastpeft.explain`` what is computed (``described``); None for
               a backward, which no call of a module runs
    flops      takes the launcher's arguments and returns what a FLOP counter adds; None: ``describe`` gives it
    """
    assert op in dispatch.ROWS, f"{op} has no row in fastpeft/dispatch.py"
    schema = torch.library.infer_schema(fake, mutates_args=mutates)
    _LIBRARY.define(f"{op}{schema}", tags=(torch.Tag.needs_fixed_stride_order,))

    def implementation(*args: Any) -> Any:
        *rest, backend = args
        return dispatch.load(op, backend)(*rest)

    _LIBRARY.impl(op, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpeft::{op}", fake, lib=_LIBRARY)
    if describe is not None:
        _described[op] = describe
        flops = flops or (lambda *args: describe(*args).flop)
    if flops is not None:
        _flops.FORMULAS[op] = flops


def register_composed(op: str, describe: Describe) -> None:
    """Register an operator made of raw ones, without a row of its own; it calls ``tell`` and then ``launch``es them."""
    _described[op] = describe


_watchers: list[Callable[[Call], None]] = []


@contextmanager
def watching(seen: Callable[[Call], None]) -> Iterator[None]:
    """Call ``seen`` with a description of every operator called inside the block."""
    _watchers.append(seen)
    try:
        yield
    finally:
        _watchers.remove(seen)


def tell(op: str, backend: str, *args: Any) -> None:
    """Describe a call to every watcher."""
    if not _watchers or op not in _described:
        return
    call = _described[op](*args)
    own = dispatch.strategy(op, backend, *args)
    call = replace(call, backend=backend, strategy="; ".join(filter(None, (own, call.strategy))))
    for seen in _watchers:
        seen(call)


# Looked up once: the attribute lookups on torch would cost a tiny call one per cent.
_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack


def _dispatched(op: str, backend: str, args: tuple[Any, ...]) -> Any:
    if not _compiling():
        _flops.tell()
    return getattr(torch.ops.fastpeft, op).default(*args, backend)


@contextmanager
def answered(answer: Callable[[str, str, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Inside the block, in every thread, ``answer`` (operator, backend, arguments) replaces every launcher."""
    global _modes, _dispatched
    before = _modes, _dispatched
    _modes, _dispatched = (lambda: 1), answer  # type: ignore[assignment]
    try:
        yield
    finally:
        _modes, _dispatched = before


def rank_dtype(dtype: torch.dtype, backend: str) -> torch.dtype:
    """The dtype of s = drop(x) Aᵀ, which a forward pass keeps, for x of ``dtype``.

    fp32 instead of fp16, in which s can overflow even if no gradient does; but fp16 where matrix units read s.
    """
    return torch.float32 if dtype == torch.float16 and backend in ("cpp", "eager") else dtype


def launch(op: str, backend: str, *args: Any) -> Any:
    """Run a raw operator: through the dispatcher where something watches it, else the launcher itself.

    The dispatcher with a Python implementation costs more than all the arithmetic of a tiny layer. A call needs it
    only to be recorded in a graph, seen by a dispatch mode (fake tensors, FLOP counters, selective checkpointing), or
    answered with shapes alone on the meta device.
    """
    if _compiling() or _modes() or args[0].is_meta:
        return _dispatched(op, backend, args)
    return dispatch.load(op, backend)(*args)


def call(op: str, backend: str, *args: Any) -> Any:
    """Run a raw operator and describe the call to every watcher."""
    if _watchers:
        tell(op, backend, *args)
    if _compiling() or _modes() or args[0].is_meta:  # `launch` without its frame
        return _dispatched(op, backend, args)
    return dispatch.load(op, backend)(*args)
