"""The operators: each checks its input, picks a backend once, and is differentiable where its docstring says so."""

from fastpeft.ops.conv_grad_a import conv_grad_a
from fastpeft.ops.conv_shrink import conv_shrink
from fastpeft.ops.dequantize_4bit import dequantize_4bit
from fastpeft.ops.linear4bit import linear4bit, linear4bit_lora
from fastpeft.ops.lora_adapter import lora_adapter
from fastpeft.ops.lora_between import lora_between
from fastpeft.ops.lora_conv2d import lora_conv1d, lora_conv2d, lora_conv3d
from fastpeft.ops.lora_expand import lora_expand, lora_expand_add
from fastpeft.ops.lora_grad_a import lora_grad_a
from fastpeft.ops.lora_grad_b import lora_grad_b
from fastpeft.ops.lora_linear import lora_linear
from fastpeft.ops.lora_linear_fused import lora_linear_fused_dx, lora_linear_fused_fwd
from fastpeft.ops.lora_linear_grouped import lora_linear_grouped
from fastpeft.ops.lora_shrink import lora_shrink
from fastpeft.ops.masks import pack_mask, unpack_mask
from fastpeft.ops.quantize_4bit import quantize_4bit
from fastpeft.ops.weight4bit import Weight4bit

__all__ = [
    "Weight4bit",
    "conv_grad_a",
    "conv_shrink",
    "dequantize_4bit",
    "linear4bit",
    "linear4bit_lora",
    "lora_adapter",
    "lora_between",
    "lora_conv1d",
    "lora_conv2d",
    "lora_conv3d",
    "lora_expand",
    "lora_expand_add",
    "lora_grad_a",
    "lora_grad_b",
    "lora_linear",
    "lora_linear_fused_dx",
    "lora_linear_fused_fwd",
    "lora_linear_grouped",
    "lora_shrink",
    "pack_mask",
    "quantize_4bit",
    "unpack_mask",
]
