"""Shared by the adapted layers: the two forms of their constructor, and which layers they may replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastpeft.ops import _checks

ADAPTING = ("original_layer", "rank", "alpha", "dropout_probability", "bias")
"""The names by position of the form that adapts a layer."""


def by_position(op: str, args: tuple[Any, ...], options: dict[str, Any], names: tuple[str, ...]) -> None:
    """Put the arguments given by position into ``options``, under ``names``."""
    rule = f"be at most {', '.join(names)} by position"
    _checks.require_dtype(len(args) <= len(names), op, "arguments", rule, len(args))
    for name, value in zip(names, args, strict=False):
        _checks.require_dtype(name not in options, op, name, "be given once", "two values")
        options[name] = value


def constructor_form(op: str, args: tuple[Any, ...], options: dict[str, Any], new: tuple[str, ...]) -> bool:
    """`by_position`, and True for the form that adapts an ``original_layer``.

    new        the positional names of the other form, which makes a base from sizes
    """
    adapting = isinstance(args[0], nn.Module) if args else "original_layer" in options
    by_position(op, args, options, ADAPTING if adapting else new)
    return adapting


def from_options(ranks: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with the defaults of a ``from_…`` constructor: rank 16, alpha 32, dropout 0.05."""
    given = {name for name, value in options.items() if value is not None}
    defaults: dict[str, Any] = {} if given & set(ranks) else {"rank": 16}
    defaults |= {} if given & {"alpha", "scaling"} else {"alpha": 32.0}
    defaults |= {} if given & {"dropout", "dropout_probability"} else {"dropout": 0.05}
    return options | defaults


def require_unhooked(op: str, layer: nn.Module) -> None:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    count = sum(map(len, hooks)) + ("forward" in layer.__dict__)
    _checks.require(count == 0, op, "original_layer", "have no hooks, which a replacement would not call", count)


def require_parameters(op: str, layer: nn.Module) -> torch.Tensor:
    """The weight of ``layer``, which holds initialised float Parameters named weight and bias."""
    weight = layer._parameters.get("weight")
    lazy = isinstance(weight, nn.parameter.UninitializedParameter)
    plain = weight is not None and not lazy and "bias" in layer._parameters
    _checks.require(
        plain, op, "original_layer", "hold initialised parameters named weight and bias (no parametrization)",
        type(layer).__name__,
    )  # fmt: skip
    assert isinstance(weight, torch.Tensor)
    _checks.floats(op, "weight", weight.dtype)
    return weight


def require_linear(op: str, layer: object) -> None:
    """Require a layer that computes x Wᵀ + bias and nothing else, as its replacement does."""
    _checks.require_dtype(
        isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward,
        op, "original_layer", "be an nn.Linear with nn.Linear's own forward", type(layer).__name__,
    )  # fmt: skip
    assert isinstance(layer, nn.Linear)
    # nn.MultiheadAttention reads the weight of its out_proj and never calls it: an adapter on it would train nothing.
    called = not isinstance(layer, NonDynamicallyQuantizableLinear)
    rule = "be called by its owner: nn.MultiheadAttention reads out_proj.weight (LoRAMultiheadAttention adapts it)"
    _checks.require(called, op, "original_layer", rule, type(layer).__name__)
    require_parameters(op, layer)
    require_unhooked(op, layer)


def called_out_proj(out: nn.Linear) -> nn.Linear:
    """nn.MultiheadAttention's out_proj, whose weight it only reads, as a layer to call, on the same Parameters."""
    plain = nn.Linear(out.in_features, out.out_features, out.bias is not None, "meta").train(out.training)
    plain.weight, plain.bias = out.weight, out.bias
    return plain
