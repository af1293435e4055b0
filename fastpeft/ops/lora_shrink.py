"""``s = drop(x) aᵀ``."""

from __future__ import annotations

import torch

from fastpeft import dispatch
from fastpeft.ops import _checks, _library


def _fake(x: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None, backend: str) -> torch.Tensor:
    return x.new_empty(x.shape[0], a.shape[0])


def _describe(x: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None) -> _library.Call:
    (M, K), R = x.shape, a.shape[0]
    return _library.described("lora_shrink", x, flop=2 * M * K * R, elements=M * K, p=p, M=M, K=K, rank=R)


_library.register("lora_shrink", _fake, describe=_describe)


def lora_shrink(
    x: torch.Tensor, a: torch.Tensor, p: float = 0.0, seed: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """``s = drop(x) aᵀ``, the projection to rank space; no autograd.

    x      [M, K]  fp32 | bf16 | fp16, last dim contiguous
    a      [R, K]  any float dtype, any strides; cast to x.dtype where the kernel multiplies in it
    p      dropout probability in [0, 1); the mask is the pure function of (seed, row, column) of reference/dropout.py
    seed   int64 of one element on x's device; needed where p > 0
    Returns    s [M, R] in x.dtype, summed in fp32
    Cost       2MKR FLOP; reads x once
    Raises     ValueError: shape, p or backend.  TypeError: dtype.
    """
    op = "lora_shrink"
    _checks.matrix(op, "x", x, (None, None), "[M, K]")
    _checks.matrix(op, "a", a, (None, x.shape[1]), "[R, K]")
    _checks.same_device(op, x.device, a=a)
    _checks.probability(op, "p", p)
    _checks.seed(op, seed, p)
    chosen = dispatch.select(op, backend, x.device.type, x.dtype)
    return _library.call(op, chosen, x if x.stride(1) == 1 else x.contiguous(), a, p, seed if p else None)
