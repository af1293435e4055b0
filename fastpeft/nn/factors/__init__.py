"""Factors: parameters in, (A, B) out, in plain torch. No base weight, no merge and no file may enter here."""

from fastpeft.nn.factors.base import LoRAModule

__all__ = ["LoRAModule"]
