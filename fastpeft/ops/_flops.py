"""FLOP formulas of the raw operators for torch.utils.flop_counter.

Importing that module also imports Triton if it is installed, half a second. So the formulas are registered when an
operator first finds it imported, with its registry and with every active counter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

FORMULAS: dict[str, Callable[..., int]] = {}
"""Raw operator -> the floating point operations of a launcher's arguments."""


def _counted(formula: Callable[..., int]) -> Callable[..., int]:
    def count(*args: Any, out_val: object = None) -> int:
        *rest, _backend = args
        return formula(*rest)

    count._get_raw = True  # type: ignore[attr-defined]
    return count


_counting: dict[Any, Callable[..., int]] = {}


def tell() -> None:
    """Register the formulas with torch's FLOP counter, if that is imported."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    for op, formula in FORMULAS.items():
        packet = getattr(torch.ops.fastpeft, op)
        if packet not in _counting:
            _counting[packet] = _counted(formula)
        module.flop_registry.setdefault(packet, _counting[packet])
    for mode in _get_current_dispatch_mode_stack():
        known = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if isinstance(known, dict):
            known.update({packet: count for packet, count in _counting.items() if packet not in known})


def backward(M: int, N: int, K: int, R: int, need_dx: bool, need_da: bool, need_db: bool) -> int:
    """FLOP of the gradients of x Wᵀ + s Bᵀ with s = x Aᵀ, W frozen; R = 0: no adapter."""
    through = 2 * M * N * R * (need_dx or need_da)
    return 2 * M * N * K * need_dx + through + 2 * M * K * R * (need_dx + need_da) + 2 * M * N * R * need_db
