"""What the adapted linear layers share: the two forms of their constructor, and what they may take the place of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpeft.nn._config import size
from fastpeft.ops import _checks


def constructor_form(op: str, args: tuple[Any, ...], options: dict[str, Any], new: tuple[str, ...]) -> bool:
    """Name the arguments given by position, in ``options``; True for the form that adapts an ``original_layer``.

    new        the names by position of the other form, which makes a layer of in_features and out_features
    """
    adapting = isinstance(args[0], nn.Module) if args else "original_layer" in options
    names = ("original_layer", "rank", "alpha", "dropout_probability", "bias") if adapting else new
    rule = f"be at most {', '.join(names)} by position"
    _checks.require_dtype(len(args) <= len(names), op, "arguments", rule, len(args))
    for name, value in zip(names, args, strict=False):
        _checks.require_dtype(name not in options, op, name, "be given once", "two values")
        options[name] = value
    return adapting


class FromSizes:
    """The second form of a constructor: a new base layer first, which the first form then adapts."""

    def _adapt_new(
        self: Any,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        base_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layout: str = "in_out",
        **options: Any,
    ) -> None:
        op = type(self).__name__
        K, N = size(op, "in_features", in_features), size(op, "out_features", out_features)
        self._adapt_layer(nn.Linear(K, N, base_bias, device, dtype), layout=layout, **options)


def default_alpha(alpha: float | None, scaling: float | None) -> float | None:
    """What ``from_linear`` takes for an alpha that is not given."""
    return 32.0 if alpha is None and scaling is None else alpha


def require_linear(op: str, layer: object) -> None:
    """Only what computes x Wᵀ + bias and nothing else may be replaced by a module that computes that."""
    _checks.require_dtype(
        isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward,
        op, "original_layer", "be an nn.Linear with nn.Linear's own forward", type(layer).__name__,
    )  # fmt: skip
    assert isinstance(layer, nn.Linear)
    weight = layer._parameters.get("weight")
    lazy = isinstance(weight, nn.parameter.UninitializedParameter)
    plain = weight is not None and not lazy and "bias" in layer._parameters
    _checks.require(
        plain, op, "original_layer", "hold initialised parameters named weight and bias (no parametrization)",
        type(layer).__name__,
    )  # fmt: skip
    assert isinstance(weight, torch.Tensor)
    _checks.floats(op, "weight", weight.dtype)
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    count = sum(map(len, hooks)) + ("forward" in layer.__dict__)
    _checks.require(count == 0, op, "original_layer", "have no hooks, which a replacement would not call", count)
