"""Gradient checkpointing of a model whose inputs are frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpeft.manager.words import Words
from fastpeft.ops import _checks

_OP = "EfficientFineTuningManager"


class Checkpointing(Words):
    """gradient_checkpointing_enable and enable_input_require_grads."""

    def gradient_checkpointing_enable(self, use_reentrant: bool = False, **options: Any) -> None:
        """Enable the model's own gradient checkpointing.

        use_reentrant    False: a frozen input stops no gradient. True: it would, so the embeddings' outputs are made
                   to require gradients first
        options    of ``torch.utils.checkpoint.checkpoint``
        A model without ``gradient_checkpointing_enable`` gets ``gradient_checkpointing = True`` on the modules that
        have this attribute.
        Raises     ValueError: the model has neither.
        """
        if use_reentrant:
            self.enable_input_require_grads()
        # transformers has renamed the method and will drop the old name.
        for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
            enable = getattr(self.model, name, None)
            if callable(enable):
                enable({"use_reentrant": use_reentrant, **options})
                return
        having = [module for module in self.model.modules() if hasattr(module, "gradient_checkpointing")]
        rule = "have gradient_checkpointing_enable(), or modules with the attribute gradient_checkpointing"
        _checks.require(bool(having), _OP, "model", rule, type(self.model).__name__)
        for module in having:
            module.gradient_checkpointing = True  # type: ignore[assignment]

    def enable_input_require_grads(self) -> None:
        """Let the outputs of the embeddings, and float inputs of the model, require gradients.

        Reentrant checkpointing, torch's old form, passes no gradient to a block unless one of its inputs requires one.
        """
        own = getattr(self.model, "enable_input_require_grads", None)
        if callable(own):
            own()
            return
        for module in self.model.modules():
            if isinstance(module, nn.Embedding) and not _hooked(module._forward_hooks, _output_requires):
                module.register_forward_hook(_output_requires)
        if not _hooked(self.model._forward_pre_hooks, _inputs_require):
            self.model.register_forward_pre_hook(_inputs_require)


def _hooked(hooks: dict[int, Any], ours: Any) -> bool:
    return ours in hooks.values()


def _output_requires(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _inputs_require(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs, made to require gradients; the caller's own tensors stay unchanged."""
    if not torch.is_grad_enabled():
        return args
    return tuple(
        each.detach().requires_grad_(True)
        if isinstance(each, torch.Tensor) and each.is_floating_point() and not each.requires_grad
        else each
        for each in args
    )
