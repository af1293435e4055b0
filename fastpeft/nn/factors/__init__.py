"""Factors: parameters in, (A, B) out, in plain torch. No base weight, no merge and no file may enter here."""

from fastpeft.nn.factors.adaptive import Adaptive
from fastpeft.nn.factors.base import LoRAModule
from fastpeft.nn.factors.condition import task
from fastpeft.nn.factors.conditional import Conditional
from fastpeft.nn.factors.gated import Gated
from fastpeft.nn.factors.hyper import Hyper
from fastpeft.nn.factors.masked import Masked, remask_after
from fastpeft.nn.factors.pruned import Pruned
from fastpeft.nn.factors.rank_allocator import RankAllocator
from fastpeft.nn.factors.sparse import Sparse

__all__ = [
    "Adaptive",
    "Conditional",
    "Gated",
    "Hyper",
    "LoRAModule",
    "Masked",
    "Pruned",
    "RankAllocator",
    "Sparse",
    "remask_after",
    "task",
]
