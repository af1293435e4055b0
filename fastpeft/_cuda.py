"""The launchers of csrc/*.cu under the names of the dispatch table.

ImportError where the extension was built without CUDA, or for other GPUs or a later driver than there are.

Four primitives are CUDA's: dequantise, the products of few rows, forward and backward, and forward's of up to 512; what
surrounds them is the composition of kernels/linear4bit.py, with its passes over activations in Triton.
"""

from __future__ import annotations

from typing import Any

import torch

from fastpeft._cuda_gpus import unmet

if (_lack := unmet()) is not None:
    raise ImportError(f"fastpeft._C {_lack}")

from fastpeft.kernels import linear4bit as _composition
from fastpeft.kernels import linear4bit_small as _triton
from fastpeft.kernels._common import arch_of, dense
from fastpeft.kernels._fourbit_cost import choose_mid
from fastpeft.kernels.lora_shrink import lora_shrink

_ops = torch.ops.fastpeft_cpp

dequantize_4bit = _ops.dequantize_4bit.default._op
_small = _ops.linear4bit_small.default._op
_small_dx = _ops.linear4bit_small_dx.default._op
_mid = _ops.linear4bit_mid.default._op

MID_ROWS = 512


def _aligned(x: torch.Tensor, chunk: int) -> bool:
    """Whether the kernels of the forward take x: 16 bits, whole chunks of columns, rows at multiples of 16 bytes."""
    return (
        x.dtype != torch.float32
        and x.shape[0] > 0
        and x.shape[1] % chunk == 0
        and x.data_ptr() % 16 == 0
        and x.stride(0) % 8 == 0
        and x.stride(0) <= 1 << 23
    )


def use_mid(x: torch.Tensor, N: int, block_size: int) -> bool:
    """Whether the packed weight is multiplied as it is by these rows, more than `use_small` takes."""
    (M, K), few = x.shape, _triton.MAX_M
    if not few < M <= MID_ROWS or N == 0 or block_size < 64 or not _aligned(x, 64):
        return False
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
    (bias,) = dense(_composition.whole_bias(bias, lora_bias, scale))
    b = b if b is None or b.stride(1) == 1 else b.contiguous()
    kernel(x, *weight, None if b is None else s, b, bias, scale, False, y)
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
    """y [M, N]; what the CUDA kernel does not take goes to Triton's, on the same packed bytes."""
    weight = (packed, scales, quant_type, block_size)
    if N == 0 or packed.data_ptr() % 8 or not _aligned(x, 32):
        return _triton.linear4bit_small(x, *weight, N, s, b, bias, lora_bias, scale)
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
    """dx [M, K] += dy w in place, or a new dx; what the CUDA kernel does not take goes to Triton's."""
    weight = (packed, scales, quant_type, block_size)
    if dy.dtype == torch.float32 or dy.numel() == 0 or K % 16 or packed.data_ptr() % 8:
        return _triton.linear4bit_small_dx(dy, *weight, K, dx)
    out = dy.new_empty(dy.shape[0], K) if dx is None else dx
    _small_dx(dy, *weight, dx is not None, out)
    return out


_PRIMITIVES = _composition.Primitives(dequantize_4bit, linear4bit_small, linear4bit_small_dx)


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
    if packed.data_ptr() % 16 or not use_mid(x, N, block_size):
        return _composition.linear4bit_fwd(x, *weight, N, a, b, bias, lora_bias, scale, p, seed, _PRIMITIVES)
    s = x.new_empty(0) if a is None else lora_shrink(x, a, p, seed)
    return _product(_mid, x, weight, N, s, b, bias, lora_bias, scale), s


def linear4bit_bwd(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As kernels/linear4bit.py's."""
    return _composition.linear4bit_bwd(*args, _PRIMITIVES)
