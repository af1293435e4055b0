"""The launchers of csrc/cuda/ under the names of the dispatch table.

Importing raises ImportError if the extension was built without CUDA, for other GPUs, or for a later driver.

The CUDA kernels are those that read a packed weight: dequantise, the products of few rows forward and backward, and the
forward product of up to 512 rows in 16 bits. kernels/linear4bit.py composes these four with Triton's passes over
activations and the vendor's GEMM on the dequantised weight.
"""

from __future__ import annotations

from typing import Any

import torch

from fastpeft._cuda_gpus import unmet

if (_lack := unmet()) is not None:
    raise ImportError(f"fastpeft._C {_lack}")

from fastpeft.kernels import linear4bit as _composition
from fastpeft.kernels._common import dense
from fastpeft.kernels._fourbit_cost import MID_TILE, choose_mid
from fastpeft.kernels._launch import arch_of
from fastpeft.kernels.linear4bit_small import MAX_M
from fastpeft.kernels.lora_shrink import lora_shrink

_ops = torch.ops.fastpeft_cpp

dequantize_4bit = _ops.dequantize_4bit.default._op
_small = _ops.linear4bit_small.default._op
_small_dx = _ops.linear4bit_small_dx.default._op
_mid = _ops.linear4bit_mid.default._op

MID_ROWS = 512


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, copied if its rows are not 16-byte aligned: x is small compared with the weight."""
    fits = x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(0) <= 1 << 23
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def takes(K: int, packed: torch.Tensor) -> bool:
    """Whether the products of few rows support such a weight."""
    return K % 32 == 0 and packed.data_ptr() % 8 == 0


def use_mid(x: torch.Tensor, packed: torch.Tensor, N: int, block_size: int) -> bool:
    """Whether these rows, too many for `use_small`, multiply the packed weight without dequantising it."""
    (M, K), few = x.shape, MAX_M
    if not few < M <= MID_ROWS or N == 0 or block_size < 64 or K % 64 or packed.data_ptr() % 16:
        return False
    M = -(-M // MID_TILE[0]) * MID_TILE[0]  # whole tiles, so that a new batch length needs no new choice
    return choose_mid(M, N, K, x.dtype, block_size, arch_of(x))


def _product(
    kernel: Any,
    x: torch.Tensor,
    weight: tuple[torch.Tensor, list[torch.Tensor], str, int],
    N: int,
    s: torch.Tensor,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    y = x.new_empty(x.shape[0], N)
    if y.numel() == 0:
        return y
    (bias,) = dense(_composition.whole_bias(bias, lora_bias, scale))
    b = b if b is None or b.stride(1) == 1 else b.contiguous()
    kernel(_aligned(x), *weight, None if b is None else s, b, bias, scale, False, y)
    return y


def linear4bit_small(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: list[torch.Tensor],
    quant_type: str,
    block_size: int,
    N: int,
    s: torch.Tensor,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """y [M, N] for a weight that `takes` accepts."""
    weight = (packed, scales, quant_type, block_size)
    return _product(_small, x, weight, N, s, b, bias, lora_bias, scale)


def linear4bit_small_dx(
    dy: torch.Tensor,
    packed: torch.Tensor,
    scales: list[torch.Tensor],
    quant_type: str,
    block_size: int,
    K: int,
    dx: torch.Tensor | None,
) -> torch.Tensor:
    """dx [M, K] += dy w in place, or a new dx, for a weight that `takes` accepts."""
    out = dy.new_zeros(dy.shape[0], K) if dx is None else dx
    if dy.numel():
        _small_dx(dy, packed, scales, quant_type, block_size, dx is not None, out)
    return out


_PRIMITIVES = _composition.Primitives(dequantize_4bit, linear4bit_small, linear4bit_small_dx, takes)


def linear4bit_fwd_strategy(
    x: torch.Tensor, packed: torch.Tensor, scales: list[torch.Tensor], quant_type: str, block_size: int, N: int,
    *rest: Any,
) -> str:  # fmt: skip
    """What ``linear4bit_fwd`` does with these arguments, in words."""
    if use_mid(x, packed, N, block_size):
        return "mid: one kernel reads the packed weight once for every 128 rows"
    weight = (packed, scales, quant_type, block_size)
    return _composition.linear4bit_fwd_strategy(x, *weight, N, *rest, _PRIMITIVES)


def linear4bit_fwd(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: list[torch.Tensor],
    quant_type: str,
    block_size: int,
    N: int,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scale: float,
    p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels/linear4bit.py's."""
    weight = (packed, scales, quant_type, block_size)
    if not use_mid(x, packed, N, block_size):
        return _composition.linear4bit_fwd(x, *weight, N, a, b, bias, lora_bias, scale, p, seed, _PRIMITIVES)
    s = x.new_empty(0) if a is None else lora_shrink(x, a, p, seed)
    return _product(_mid, x, weight, N, s, b, bias, lora_bias, scale), s


def linear4bit_bwd(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As kernels/linear4bit.py's."""
    return _composition.linear4bit_bwd(*args, _PRIMITIVES)
