"""A model whose layers were adapted in place: the trained part, its state, and merging."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from fastpeft.manager import archive
from fastpeft.nn.config import OPTIONS, refuse_unknown
from fastpeft.nn.factors.base import LoRAModule
from fastpeft.nn.merge import Mergeable
from fastpeft.ops import _checks

_Self = TypeVar("_Self", bound="Adapted")


def slide_options(op: str, rank: int, options: Mapping[str, Any], *known: str) -> dict[str, Any]:
    """The document's convention (randn, 0.01, no dropout) with ``options``; ``alpha`` or ``use_rslora`` selects kaiming
    and α/r, as everywhere.

    Raises     TypeError: an option that is neither an adapter's nor ``known``.
    """
    refuse_unknown(op, options, (*OPTIONS, *known))
    return {"layout": "in_out", "rank": rank, **options}


def adapt(model: nn.Module, layers: Mapping[str, nn.Module], adapted: Callable[[Any], nn.Module]) -> None:
    """Replace each of ``layers`` {path: layer} by ``adapted(layer)``; after an error nothing is changed.

    A layer that appears in several places is adapted once, and its adapted layer takes all of them.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    made: dict[int, nn.Module] = {}
    try:
        for layer in layers.values():
            if id(layer) not in made:
                made[id(layer)] = adapted(layer)
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    for path, layer in layers.items():
        holder, _, leaf = path.rpartition(".")
        model.get_submodule(holder)._modules[leaf] = made[id(layer)]


class Adapted(nn.Module):
    """The base class of the models: trained adapters and a trained head over a frozen model."""

    _head: frozenset[str]

    def _freeze(self, head: Iterable[torch.Tensor]) -> None:
        """Train the adapters and ``head``, compared by identity, and nothing else."""
        wanted = {id(parameter) for parameter in head}
        self._head = frozenset(name for name, parameter in self.named_parameters() if id(parameter) in wanted)
        trained = set(self._trained())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)

    def _trained(self) -> dict[str, torch.Tensor]:
        """{name: tensor} of what training changes, even if frozen by hand."""
        adapters = {
            f"{path}.{name}"
            for path, module in self.named_modules()
            if isinstance(module, LoRAModule)
            for name in ("lora_A", "lora_B", "lora_bias")
        }
        kept = adapters | self._head
        return {name: parameter for name, parameter in self.named_parameters() if name in kept}

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters for an optimizer, each once."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def count_trainable_parameters(self) -> int:
        """The elements of ``get_trainable_parameters()``."""
        return sum(parameter.numel() for parameter in self.get_trainable_parameters())

    def count_parameters(self) -> int:
        """The elements of all parameters, each counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def efficient_state_dict(self) -> dict[str, torch.Tensor]:
        """{name: tensor} of the adapters and the head, as in ``state_dict()``: the file that one task needs."""
        return {name: value.detach() for name, value in self._trained().items()}

    @torch.no_grad()
    def load_efficient_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what ``efficient_state_dict`` gave; a merged model is unmerged first.

        Raises     ValueError: an unknown or missing name, a shape, a value that is not finite.  TypeError: not a
                   tensor, or not of floats. Nothing has been changed then.
        """
        op, own = type(self).__name__, self._trained()
        _checks.require_dtype(isinstance(state, Mapping), op, "state", "be a state dict", type(state).__name__)
        missing, unexpected = [*(own.keys() - state.keys())], [*(state.keys() - own.keys())]
        for rule, names in (("have every trained tensor", missing), ("have trained tensors alone", unexpected)):
            found = ", ".join(sorted(map(str, names))[:4]) + (" …" if len(names) > 4 else "")
            _checks.require(not names, op, "state", rule, f"{'no' if names is missing else 'also'} {found}")
        for name, value in state.items():
            _checks.tensor(op, name, value)
            shape = list(own[name].shape)
            _checks.require(value.shape == own[name].shape, op, name, f"have shape {shape}", list(value.shape))
            kind = own[name].is_floating_point()
            rule = f"be {'floating point' if kind else 'integer'}"
            _checks.require_dtype(value.is_floating_point() == kind, op, name, rule, value.dtype)
            _checks.require(bool(value.isfinite().all()), op, name, "be finite", "inf or nan")
        self.unmerge()
        for name, value in state.items():
            own[name].copy_(value)

    def save_efficient_weights(self, path: str | os.PathLike[str]) -> None:
        """Save ``efficient_state_dict()`` in one file, as the manager does: safetensors, or torch's archive if ``path``
        ends in .pt, .pth or .bin; written to a temporary name and renamed.

        Raises     ImportError: safetensors is needed and not installed.  OSError: as the file system says.
        """
        archive.write(path, self.efficient_state_dict(), {"model": type(self).__name__})

    def load_efficient_weights(self, path: str | os.PathLike[str]) -> None:
        """Load what ``save_efficient_weights`` saved from this class and shape; a merged model is unmerged first.

        Raises     FileNotFoundError.  ValueError: another file, another class, and as ``load_efficient_state_dict``.
                   Nothing has been changed then.
        """
        op = type(self).__name__
        tensors, about = archive.read(op, path)
        _checks.require(about.get("model") == op, op, "path", f"hold weights of a {op}", about.get("model"))
        self.load_efficient_state_dict(tensors)

    def _mergeable(self) -> list[Mergeable]:
        return [module for module in self.modules() if isinstance(module, Mergeable)]

    def merge(self: _Self) -> _Self:
        """Merge every enabled adapter into its layer; ``train()`` and ``unmerge()`` take them out, bit for bit.

        Raises     ValueError: an adapter that cannot be merged now; none is merged then.
        """
        done = []
        try:
            for module in self._mergeable():
                if module.enabled and not module.merged:
                    module.merge()
                    done.append(module)
        except BaseException:
            for module in done:
                module.unmerge()
            raise
        return self

    def unmerge(self: _Self) -> _Self:
        """Restore the layers as they were before ``merge``."""
        for module in self._mergeable():
            if module.merged:
                module.unmerge()
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Enable the model's own gradient checkpointing, in the non-reentrant form: the embeddings are frozen, and in
        a reentrant checkpoint whose inputs need no gradient no parameter gets one.

        Raises     ValueError: a model that has none.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for module in self.children():
            for name in ("activation", "gradient"):  # transformers' current name, and its older one
                enable = getattr(module, f"{name}_checkpointing_enable", None)
                if enable is not None:
                    enable(**{f"{name}_checkpointing_kwargs": options})
                    return
        rule = "have gradient_checkpointing_enable()"
        _checks.require(False, type(self).__name__, "model", rule, "a module without it")
