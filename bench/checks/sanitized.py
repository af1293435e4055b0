"""The CUDA kernels of csrc/ at small shapes, for compute-sanitizer: ``python bench sanitized``; needs the extension.

Small and odd shapes on purpose: rows that are no multiple of a tile, one row, blocks that straddle rows.
"""

import torch

from fastpeft import dispatch, ops

DEQUANTIZED = ((7, 64), (33, 96), (64, 130))
PRODUCTS = ((1, 64, 128, 0), (7, 96, 256, 4), (16, 40, 512, 16), (64, 72, 128, 8), (129, 80, 192, 5))  # M, N, K, R


def main(argv: list[str] | None = None) -> int:
    """Launches every kernel once; a sanitizer watches. Nonzero without the CUDA kernels."""
    lack = dispatch.unmet("dequantize_4bit", "cuda", "cuda", torch.bfloat16)
    if lack is not None:
        print(f"sanitized: nothing ran, the CUDA kernels require {lack}")
        return 1
    launched = 0
    for dtype in (torch.bfloat16, torch.float16):
        for N, K in DEQUANTIZED:
            weight = ops.quantize_4bit(torch.randn(N, K, device="cpu"), backend="eager").to("cuda")
            ops.dequantize_4bit(weight, dtype, backend="cuda")
            launched += 1
        for M, N, K, R in PRODUCTS:
            weight = ops.quantize_4bit(torch.randn(N, K, device="cpu"), backend="eager").to("cuda")
            x = torch.randn(M, K).to("cuda", dtype).requires_grad_()
            if R:
                a, b = torch.randn(R, K).cuda().requires_grad_(), torch.randn(N, R).cuda().requires_grad_()
                y = ops.linear4bit_lora(x, weight, a, b, scale=1.0, backend="cuda")
            else:
                y = ops.linear4bit(x, weight, backend="cuda")
            y.backward(torch.ones_like(y))
            launched += 1
    torch.cuda.synchronize()
    print(f"sanitized: {launched} calls")
    return 0
