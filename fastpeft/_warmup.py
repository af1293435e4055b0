"""Compile the kernels that a model needs before its first step: in parallel processes, not one by one during it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastpeft import dispatch
from fastpeft.integrations.peft import calls as peft_calls
from fastpeft.integrations.peft.kind import Accelerated
from fastpeft.nn.factors.base import LoRAModule
from fastpeft.nn.layers._parts import Parts
from fastpeft.ops import _library

MOST = 16  # processes: each holds torch and Triton, about 0.5 GB


@dataclass(frozen=True)
class Warmup:
    """The result of ``fastpeft.warmup``."""

    kernels: tuple[str, ...] = ()
    """Names of the kernels that were compiled, or taken from Triton's cache on disk; one has several variants."""
    seconds: float = 0.0
    left: dict[str, str] = field(default_factory=dict)
    """Adapted layers whose kernels are unknown -> why: they compile when they are first called."""
    why: str = ""
    """Why there was nothing to compile."""

    def __str__(self) -> str:
        if self.why:
            lines = [f"fastpeft: nothing to compile, {self.why}"]
        else:
            lines = [f"fastpeft: {len(self.kernels)} kernels ready in {self.seconds:.1f} s"]
        lines += [f"  {name}: not known before its first call, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def warmup(
    model: nn.Module,
    tokens: int | Iterable[int] = (),
    *,
    inputs: Any = None,
    dtype: torch.dtype | None = None,
    processes: int | None = None,
) -> Warmup:
    """Compile and load every Triton kernel that a step of ``model`` will launch; in train mode, a training step.

    model       with layers of this package, or PEFT's after ``fastpeft.accelerate``; on its GPU and in its final state:
                adapters in place, ``train()`` or ``eval()``, inside the ``torch.autocast`` that the step will use
    tokens      rows that a layer will see, batch times length: a count or several. Lengths divisible by 16 share their
                kernels, and so do all others: two counts cover every batch
    inputs      of the model: a tensor, a tuple of positional arguments or a dict of keywords; for layers that take
                no rows of features (convolutions, recurrent layers, attention). Only their shapes and dtypes matter
    dtype       of the activations; None: of each layer's weight, bf16 for a packed one
    processes   that compile; None: one per processor of this machine, at most 16
    Each distinct layer runs once on zeros (with ``inputs`` the whole model) with our operators left out: gradients,
    buffers, generators and counters stay unchanged. Call it before DDP or FSDP wraps the model, or on every rank.
    Returns     a `Warmup`: kernels, seconds, layers left out; print it. Without a GPU it says so and compiles nothing
    Raises      ValueError: a count below 1, or neither tokens nor inputs. What the model raises on ``inputs``
    """
    counts = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    for count in counts:
        if count < 1:
            raise ValueError(f"warmup: tokens must be positive, got {count}")
    if not counts and inputs is None:
        raise ValueError("warmup: tokens or inputs must be given, got neither")
    device = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    if device is None:
        return Warmup(why="no parameter of the model is on a CUDA device")
    lack = dispatch.unmet("lora_linear_fwd", "triton", "cuda", torch.float32)
    if lack is not None:
        return Warmup(why=f"Triton's kernels require {lack}")
    if dispatch._interpreted():
        return Warmup(why="TRITON_INTERPRET is set")
    with torch.cuda.device(device):
        return _warm(model, counts, inputs, dtype, processes)


def _warm(
    model: nn.Module, counts: tuple[int, ...], inputs: Any, dtype: torch.dtype | None, processes: int | None
) -> Warmup:
    warm = importlib.import_module("fastpeft.kernels._warm")
    started = time.perf_counter()
    asked, left = needed(model, counts, inputs, dtype)
    launches = launches_of(asked)
    jobs = warm.missing(launches)
    compile_all(jobs, processes)
    warm.load(launches, torch.cuda.is_available())
    return Warmup(tuple(sorted(job.name for job in jobs)), time.perf_counter() - started, left)


Asked = tuple[str, str, tuple[Any, ...]]
"""An operator, its backend and its arguments, tensors on the meta device."""


def needed(
    model: nn.Module, counts: tuple[int, ...], inputs: Any, dtype: torch.dtype | None
) -> tuple[list[Asked], dict[str, str]]:
    """The distinct operator calls of a step, and {layer that was left out: why}."""
    asked: dict[str, Asked] = {}
    left: dict[str, str] = {}
    called = 0

    def answer(op: str, backend: str, args: tuple[Any, ...]) -> Any:
        nonlocal called
        called += 1
        device = next(each.device for each in args if isinstance(each, torch.Tensor))
        on_meta = _mapped(_meta, args)
        asked.setdefault(repr((op, backend, _mapped(_described, on_meta))), (op, backend, on_meta))
        out = getattr(torch.ops.fastpeft, op).default(*on_meta, backend)
        return _mapped(lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device), out)

    with _untouched(model), _library.answered(answer):
        if inputs is not None:
            _step(model, *_arguments(inputs))
        done = set()
        for name, layer in _adapted(model):
            try:
                for x in _rows(layer, counts, dtype):
                    key = (_likeness(layer), x.shape, x.dtype, x.requires_grad)
                    if key in done:
                        continue
                    done.add(key)
                    before = called
                    _step(layer, (x,), {})
                    if called == before:
                        left[name] = "its call is not one of our operators"
            except (TypeError, ValueError, RuntimeError) as error:
                left[name] = str(error)
    return list(asked.values()), {} if inputs is not None else left


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that run our operators; of nested ones, the outer."""
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, (LoRAModule, Parts, Accelerated)):
            inside = f"{name}." if name else ""
            yield name, module


def _rows(layer: Any, counts: tuple[int, ...], dtype: torch.dtype | None) -> Iterator[torch.Tensor]:
    """The inputs with which a layer may be called."""
    base: Any = getattr(layer, "base_layer", layer)  # PEFT's layers have their base inside
    width, weight = getattr(layer, "in_features", None), getattr(base, "weight", None)
    if not isinstance(width, int) or isinstance(base, nn.Embedding):
        raise TypeError(f"{type(layer).__name__} takes no rows of features: warmup(model, inputs=...) knows it")
    device = next(layer.parameters()).device
    if dtype is None:
        dtype = weight.dtype if weight is not None and weight.dtype.is_floating_point else torch.bfloat16
    for count in counts:
        # The input of the first adapted layer needs no gradient; that of all others does.
        for needs in (True, False) if layer.training else (False,):
            yield torch.zeros(count, width, dtype=dtype, device=device, requires_grad=needs)


def _likeness(layer: nn.Module) -> Any:
    """A key that is equal for layers with the same launches."""
    parameters = ((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), repr(layer), layer.training, tuple(parameters)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _step(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run forward and, in training, backward; the gradients are discarded."""
    with torch.set_grad_enabled(module.training):
        given = module(*args, **kwargs)
    out = [each for each in _tensors(given) if each.requires_grad]
    leaves = [each for each in (*module.parameters(), *_tensors((args, kwargs))) if each.requires_grad]
    if out and leaves:
        torch.autograd.grad(out, leaves, [torch.zeros_like(each) for each in out], allow_unused=True)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Restore buffers, torch's generators and the counts of PEFT's layers on exit."""
    buffers = [(each, each.clone()) for each in model.buffers()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices), peft_calls.uncounted():
            yield
    finally:
        with torch.no_grad():
            for each, before in buffers:
                each.copy_(before)


def launches_of(asked: list[Asked]) -> list[Any]:
    """The launches that these calls would make on the current device."""
    kernels = importlib.import_module("fastpeft.kernels._launch")
    found: list[Any] = []
    with kernels.captured(kernels.current_gpu()) as launches:
        for op, backend, args in asked:
            if backend == "triton":
                dispatch.load(op, backend)(*args)
            elif backend == "cuda" and op.startswith("linear4bit"):
                # The CUDA backend uses Triton for its passes over activations; its own kernels are already compiled.
                dispatch.load(op, "triton")(*args, _compiled_primitives(args))
        found += launches
    return found


def _compiled_primitives(args: tuple[Any, ...]) -> Any:
    kernels = importlib.import_module("fastpeft.kernels.linear4bit")

    def product(x: torch.Tensor, packed: Any, scales: Any, quant_type: str, block_size: int, N: int, *_: Any) -> Any:
        return x.new_empty(x.shape[0], N)

    return kernels.Primitives(lambda *_: None, product, product, lambda K, packed: K % 32 == 0)


def compile_all(jobs: list[Any], processes: int | None = None) -> None:
    """Compile in processes; a job that fails is compiled again when it is loaded, and raises there."""
    workers = min(len(jobs), processes or min(MOST, os.cpu_count() or 1))
    if not workers:
        return
    waiting = iter(jobs)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    command = [sys.executable, "-m", "fastpeft.kernels._warm"]

    def feed(_: int) -> None:
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )  # fmt: skip
        assert worker.stdin is not None and worker.stdout is not None
        with worker:
            for job in waiting:  # next() of a list's iterator is one step of the interpreter
                worker.stdin.write(json.dumps(job) + "\n")
                worker.stdin.flush()
                if not worker.stdout.readline():
                    break  # the worker died; its job is compiled when it is loaded
            worker.stdin.close()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(feed, range(workers)))


def _mapped(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """`change` of every tensor in lists and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(_mapped(change, each) for each in value) if isinstance(value, (list, tuple)) else value


def _meta(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _described(t: torch.Tensor) -> Any:
    return t.dtype, tuple(t.shape), t.stride()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
