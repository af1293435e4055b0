"""Counts of a model's parameters and of the trained ones, each counted once, and a table of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


def distinct(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Each parameter once, however many modules hold it."""
    return list({id(parameter): parameter for parameter in parameters}.values())


def elements(parameter: torch.Tensor) -> int:
    """The number of elements; a byte of a 4-bit weight counts as two."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


@dataclass(frozen=True)
class Row:
    """One line of the table: an adapter of one method."""

    adapter: str
    method: str
    modules: int
    trainable: int


def table(rows: Iterable[Row], parameters: Iterable[torch.Tensor]) -> str:
    """The rows, the total of trained parameters, and its share."""
    every = distinct(parameters)
    total = sum(elements(p) for p in every)
    trained = sum(p.numel() for p in every if p.requires_grad)
    lines = [("adapter", "method", "modules", "trainable")]
    lines += [(row.adapter, row.method, f"{row.modules:,}", f"{row.trainable:,}") for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    text = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines]  # fmt: skip
    share = 100 * trained / total if total else 0.0
    text.append(f"trainable {trained:,} of {total:,} parameters ({share:.3f} %)")
    return "\n".join(line.rstrip() for line in text)
