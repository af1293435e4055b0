"""The C++ launchers of csrc/, under the names of the dispatch table.

Importing raises ImportError if the extension was not built, RuntimeError if it was built from another version.
"""

from __future__ import annotations

from typing import Any

import torch

from fastpeft._extension import _C

# `_op`: the overload's own callable, without the Python frame of OpOverload.__call__.
_ops = torch.ops.fastpeft_cpp

try:
    lora_shrink = _ops.lora_shrink.default._op
    lora_expand = _ops.lora_expand.default._op
    lora_expand_add = _ops.lora_expand_add.default._op
    lora_grad_b = _ops.lora_grad_b.default._op
    lora_grad_a = _ops.lora_grad_a.default._op
    lora_linear_fwd = _ops.lora_linear_fwd.default._op
    lora_linear_bwd = _ops.lora_linear_bwd.default._op
    lora_between_fwd = _ops.lora_between_fwd.default._op
    lora_between_bwd = _ops.lora_between_bwd.default._op
    dropout_rows = _ops.dropout_rows.default._op
    quantize_4bit = _ops.quantize_4bit.default._op
    quantize_absmax = _ops.quantize_absmax.default._op
    dequantize_4bit = _ops.dequantize_4bit.default._op
    linear4bit_fwd = _ops.linear4bit_fwd.default._op
    linear4bit_bwd = _ops.linear4bit_bwd.default._op

    isas = _C.isas
    set_isa = _C.set_isa
    build_info = _C.build_info
    set_fourbit_path = _C.set_fourbit_path
    linear4bit_path = _C.linear4bit_path
    kept_bytes = _C.kept_bytes
    release_kept = _C.release_kept
except AttributeError as missing:  # not an ImportError, which would look like an extension that was never built
    raise RuntimeError(
        f"fastpeft: the compiled extension must be of this version, got one of another ({missing}): "
        f"build it again (pip install --no-build-isolation .) or remove {_C.__file__}"
    ) from missing

NATIVE = {
    "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
# A processor without bf16 (fp16) arithmetic multiplies in fp32: torch's own products there run at a hundredth of the
# speed of fp32.
_C.set_native_gemm(NATIVE["bfloat16"], NATIVE["float16"])


_FOURBIT = {
    "gemv": "gemv: few rows multiply the packed weight as it is stored",
    "fused": "fused: decoded piece by piece in the cache for the units that multiply bf16",
    "panels": "panels: dequantised in the cache for the vendor GEMM",
}


def lora_linear_fwd_strategy(x: torch.Tensor, *_: Any) -> str:
    """What ``lora_linear_fwd`` does with these arguments, in words."""
    name = str(x.dtype).removeprefix("torch.")
    if NATIVE.get(name, True):
        return "accumulate: rank-R product first, then the vendor GEMM with beta = 1"
    return f"upcast: accumulate in fp32, as this processor has no {name} arithmetic"


def linear4bit_fwd_strategy(
    x: torch.Tensor, packed: torch.Tensor, scales: list[torch.Tensor], quant_type: str, block_size: int, *_: Any
) -> str:
    """What ``linear4bit_fwd`` does with these arguments, in words."""
    return _FOURBIT[linear4bit_path(*x.shape, str(x.dtype).removeprefix("torch."), block_size)]
