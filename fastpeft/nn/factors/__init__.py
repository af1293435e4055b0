"""Factors: parameters in, (A, B) out, in plain torch. No base weight, no merge and no file may enter here."""

from fastpeft.nn.factors.adaptive import Adaptive
from fastpeft.nn.factors.base import LoRAModule
from fastpeft.nn.factors.rank_allocator import RankAllocator

__all__ = ["Adaptive", "LoRAModule", "RankAllocator"]
