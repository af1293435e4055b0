"""The options of an adapter as JSON and back, so that a file can say how to apply it again."""

from __future__ import annotations

from typing import Any

import torch

_DTYPE = "torch.dtype:"


def to_json(options: dict[str, Any]) -> dict[str, Any] | None:
    """None if an option is neither plain data nor a dtype (a schedule that is a function)."""
    out: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, torch.dtype):
            out[name] = _DTYPE + str(value).removeprefix("torch.")
        elif _plain(value):
            out[name] = list(value) if isinstance(value, tuple) else value
        else:
            return None
    return out


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))


def from_json(options: dict[str, Any]) -> dict[str, Any]:
    """The options again. Raises AttributeError, TypeError: not options of ours."""
    return {name: _value(value) for name, value in options.items()}


def _value(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_DTYPE):
        dtype = getattr(torch, value.removeprefix(_DTYPE))
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{value} is no dtype")
        return dtype
    return value
