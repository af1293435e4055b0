"""``da = dsᵀ drop(x)`` and ``mask ∘ (ds a) / keep``, in one read of x."""

from __future__ import annotations

import torch

from fastpeft import dispatch
from fastpeft.ops import _checks, _library


def _fake(
    x: torch.Tensor,
    ds: torch.Tensor,
    a: torch.Tensor,
    p: float,
    seed: torch.Tensor | None,
    need_dx: bool,
    need_da: bool,
    mask: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        a.new_empty(a.shape) if need_da else a.new_empty(0),
        ds.new_empty(ds.shape[0], a.shape[1]) if need_dx else ds.new_empty(0),
    )


def _describe(
    x: torch.Tensor,
    ds: torch.Tensor,
    a: torch.Tensor,
    p: float,
    seed: object,
    need_dx: bool,
    need_da: bool,
    mask: object,
) -> _library.Call:
    M, (R, K), outputs = ds.shape[0], a.shape, need_dx + need_da
    flop, elements = 2 * M * K * R * outputs, M * K * outputs
    return _library.described("lora_grad_a", ds, flop=flop, elements=elements, p=p, M=M, K=K, rank=R)


_library.register("lora_grad_a", _fake, describe=_describe)


def lora_grad_a(
    x: torch.Tensor,
    ds: torch.Tensor,
    a: torch.Tensor,
    p: float = 0.0,
    seed: torch.Tensor | None = None,
    *,
    need_dx: bool = True,
    need_da: bool = True,
    mask: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both gradients from one read of x; no autograd.

    x      [M, K]  fp32 | bf16 | fp16, last dim contiguous; not read where need_da is False
    ds     [M, R]  dtype of x
    a      [R, K]  any float dtype, any strides
    p, seed    as in lora_shrink: the same mask
    mask   [R, ceil(K / 8)]  uint8, one bit per element of da, lowest first: da is zero where its bit is; or None
    Returns    da = dsᵀ drop(x) [R, K] in a.dtype · dx = mask ∘ (ds a) / keep [M, K] in x.dtype;
               an output not asked for has shape [0]
    Cost       2MKR FLOP each; reads x once, writes dx once
    Raises     ValueError: shape, p or backend.  TypeError: dtype.
    """
    op = "lora_grad_a"
    _checks.matrix(op, "x", x, (None, None), "[M, K]")
    _checks.matrix(op, "a", a, (None, x.shape[1]), "[R, K]")
    _checks.matrix(op, "ds", ds, (x.shape[0], a.shape[0]), "[M, R]")
    _checks.require_dtype(ds.dtype == x.dtype, op, "ds", f"have the dtype of x, {x.dtype}", ds.dtype)
    _checks.same_device(op, x.device, ds=ds, a=a)
    _checks.probability(op, "p", p)
    _checks.seed(op, seed, p)
    _checks.bits(op, "mask", mask, *a.shape)
    _checks.same_device(op, x.device, mask=mask)
    chosen = dispatch.select(op, backend, x.device.type, x.dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    return _library.call(op, chosen, x, ds.contiguous(), a, p, seed if p else None, need_dx, need_da, mask)
