"""An adapter as data: every format is read into it and written from it. It knows no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import inf, nextafter
from typing import Any

import torch

from fastpeft.ops import _checks

PROMPTS = ("prompt_tuning", "ptuning", "prefix_tuning")


@dataclass
class Part:
    """LoRA on one layer: W + scaling · (B · diag(gain)) A, and scaling · bias beside the layer's own.

    a          [r, K]; of a convolution [r, C / groups, *kernel]
    b          [N, r]
    gain       [r, 1], AdaLoRA's; None: 1
    bias       [N], or None
    full_rank  of AdaLoRA, the initial rank, from which its scaling is computed
    names      {"a": the name of that tensor and its file, …}, for errors
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    full_rank: int | None = None
    alpha: float | None = None
    use_rslora: bool = False
    names: dict[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return int(self.b.shape[1])

    def tensors(self) -> dict[str, torch.Tensor]:
        held = {"a": self.a, "b": self.b, "gain": self.gain, "bias": self.bias}
        return {name: value for name, value in held.items() if value is not None}

    def named(self, part: str) -> str:
        return self.names.get(part, part)


@dataclass
class Bundle:
    """One adapter of a model.

    kind       "lora", "adalora", or one of `PROMPTS`
    parts      {name of a module: Part}
    dropout    on the input of A, or on the virtual tokens
    table      [P, width] of virtual tokens; a prefix's columns are (layer, key | value, head, size)
    sizes      of virtual tokens: num_layers, num_heads, token_dim
    whole      {name of a tensor of the model: its value} of fully trained modules
    modules    the names of those modules, exact or the ends of dotted names
    names      {"table" or a name in ``whole``: the name of that tensor and its file}
    """

    kind: str
    parts: dict[str, Part] = field(default_factory=dict)
    dropout: float = 0.0
    table: torch.Tensor | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def named(self, key: str) -> str:
        return self.names.get(key, key)

    def as_lora(self) -> Bundle:
        """The same with AdaLoRA's gains in A."""
        if self.kind != "adalora":
            return self
        parts = {path: replace(part, a=part.a if part.gain is None else part.a * part.gain, gain=None)
                 for path, part in self.parts.items()}  # fmt: skip
        return replace(self, kind="lora", parts=parts)

    def check(self, op: str) -> None:
        """Check that every tensor is a finite float tensor, and that the tensors of a part fit one another.

        Raises     ValueError, TypeError: the text names the tensor and its file.
        """
        for part in self.parts.values():
            for name, value in part.tensors().items():
                check_float(op, part.named(name), value)
            r = part.a.shape[0]
            sound = part.a.dim() >= 2 and r > 0
            _checks.require(sound, op, part.named("a"), "have two dimensions or more", list(part.a.shape))
            shapes = {"b": (part.b.shape[0], r), "gain": (r, 1), "bias": (part.b.shape[0],)}
            for name, value in part.tensors().items():
                shape = shapes.get(name, tuple(value.shape))
                rule = f"have shape {list(shape)} beside {part.named('a')}"
                _checks.require(tuple(value.shape) == shape, op, part.named(name), rule, list(value.shape))
        if self.table is not None:
            check_float(op, self.named("table"), self.table)
            _checks.require(self.table.dim() == 2, op, self.named("table"), "be a matrix", list(self.table.shape))
        for key, value in self.whole.items():
            finite = not value.is_floating_point() or bool(value.isfinite().all())
            _checks.require(finite, op, self.named(key), "be finite", "inf or nan")

    def cast(self, op: str, dtype: torch.dtype | None) -> None:
        """Cast every float tensor to ``dtype``; None leaves each in its own.

        Raises     ValueError: a value that is not finite there.
        """
        if dtype is None:
            return
        _checks.floats(op, "dtype", dtype)

        def moved(name: str, value: torch.Tensor) -> torch.Tensor:
            out = value.to(dtype) if value.is_floating_point() else value
            sound = not out.is_floating_point() or bool(out.isfinite().all())
            _checks.require(sound, op, name, f"be finite in {dtype}", "inf or nan")
            return out

        for path, part in self.parts.items():
            for name, value in part.tensors().items():
                setattr(part, name, moved(f"{path} ({name})", value))
        if self.table is not None:
            self.table = moved("the virtual tokens", self.table)
        self.whole = {key: moved(key, value) for key, value in self.whole.items()}


def check_float(op: str, name: str, value: torch.Tensor) -> None:
    _checks.floats(op, name, value.dtype)
    _checks.require(bool(value.isfinite().all()), op, name, "be finite", "inf or nan")


def common(op: str, what: str, values: Iterable[Any]) -> Any:
    """The one value that all have; ValueError if they differ."""
    listed = list(dict.fromkeys(values))
    _checks.require(len(listed) == 1, op, what, "be the same in all layers of the adapter", listed[:4])
    return listed[0]


def most_common(values: Iterable[Any]) -> Any:
    listed = list(values)
    return max(dict.fromkeys(listed), key=listed.count)


def alpha_of(scaling: float, divisor: float) -> float:
    """α with α / divisor == scaling to the last bit, if such a float exists."""
    alpha = scaling * divisor
    near = (alpha, nextafter(alpha, inf), nextafter(alpha, -inf))
    exact = next((each for each in near if each / divisor == scaling), alpha)
    return int(exact) if exact == int(exact) else exact


def kernel_of(module: Any) -> tuple[int, ...]:
    """The kernel of the convolution that a module is, or that a stack of adapters holds; () of any other layer."""
    return tuple(getattr(getattr(module, "layer", module), "kernel_size", ()))
