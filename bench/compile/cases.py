"""What compile/kernels.py compiles: every launcher on meta tensors, with the flags and ranks that models meet."""

import torch

from compile.conv import convolution

M, N, K = 8192, 4096, 4096
# (M, N, K) of models, whose programs and waves are counted: the first is what is compiled.
SHAPES = ((8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (9216, 4096, 4096))
SCALE = 2.0
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def adapters(R, dtype):
    return meta((R, K), dtype), meta((N, R), dtype)


def shrink(op, x_dtype, R, a_dtype):
    a, seed = adapters(R, a_dtype)[0], meta((1,), torch.int64)
    for p in (0.0, 0.1):
        for copy in (None, meta((M, K + 16), x_dtype)[:, :K]):
            op.lora_shrink(meta((M, K), x_dtype), a, p, seed, copy=copy)


def expand(op, x_dtype, R, a_dtype):
    s, b = meta((M, R), x_dtype), adapters(R, a_dtype)[1]
    op.lora_expand(s, b, meta((N,), x_dtype), meta((N,), a_dtype), SCALE)
    if a_dtype == FP32:
        op.lora_expand(s, b, None, None, SCALE)
        op.lora_expand_add(meta((M, N), x_dtype), s, b, SCALE)


def grad_b(op, x_dtype, R, a_dtype):
    dy, s, b = meta((M, N), x_dtype), meta((M, R), x_dtype), adapters(R, a_dtype)[1]
    op.lora_grad_b(dy, s, b, SCALE, True, True)
    if a_dtype == FP32:
        for need_db, mask in ((True, None), (False, None), (True, meta((R, N // 8), torch.uint8))):
            op.lora_grad_b(dy, s, b, SCALE, need_db, False, mask)


def grad_a(op, x_dtype, R, a_dtype):
    x, ds, a, seed = meta((M, K), x_dtype), meta((M, R), x_dtype), adapters(R, a_dtype)[0], meta((1,), torch.int64)
    for p in (0.0, 0.1):
        op.lora_grad_a(x, ds, a, p, seed, True, True)
        if a_dtype == FP32:
            op.lora_grad_a(x, ds, a, p, seed, False, True)
            op.lora_grad_a(x, ds, a, p, seed, True, True, meta((R, K // 8), torch.uint8))
            if R in (16, 64, 128):
                op.lora_grad_a(x, ds, a, p, seed, True, False)


def linear_fused(op, x_dtype, R, a_dtype):
    (a, b), seed = adapters(R, a_dtype), meta((1,), torch.int64)
    x, w, s, dy = meta((M, K), x_dtype), meta((N, K), x_dtype), meta((M, R), x_dtype), meta((M, N), x_dtype)
    op.lora_linear_fused_fwd(x, w, s, b, meta((N,), x_dtype), meta((N,), a_dtype), SCALE)
    if a_dtype == FP32:
        op.lora_linear_fused_fwd(x, w, s, b, None, None, SCALE)
        op.lora_linear_fused_dx(dy, w, s, a, 0.0, None)
    op.lora_linear_fused_dx(dy, w, s, a, 0.1, seed)


def packed_weight(block_size, double, n=N * K):
    """(packed, scales) of a weight of n values."""
    blocks = -(-n // block_size)
    absmax = [meta((blocks,), torch.uint8), meta((256,), FP32), meta((-(-blocks // 256),), FP32), meta((), FP32)]
    return meta(((n + 1) // 2,), torch.uint8), absmax if double else [meta((blocks,), FP32)]


# Formats of a 4-bit weight: what transformers quantises to, the other table, and blocks longer than a tile.
FORMATS = (("nf4", 64, True), ("fp4", 64, False), ("nf4", 32, False), ("nf4", 4096, True))


def ragged(modules, only):
    """Rows that 16 does not divide, which take smaller tiles of the three passes."""
    M, K, N = 8191, 4097, 4095
    seed = meta((1,), torch.int64)
    for x_dtype, R in ((BF16, 16), (BF16, 64), (FP32, 16)):
        x, s, a, b = meta((M, K), x_dtype), meta((M, R), x_dtype), meta((R, K), FP32), meta((N, R), FP32)
        for p in (0.0, 0.1):
            if "lora_shrink" in only:
                modules["lora_shrink"].lora_shrink(x, a, p, seed)
            if "lora_grad_a" in only:
                modules["lora_grad_a"].lora_grad_a(x, s, a, p, seed, True, True)
        if "lora_expand" in only:
            modules["lora_expand"].lora_expand(s, b, meta((N,), x_dtype), meta((N,), FP32), SCALE)
            modules["lora_expand"].lora_expand_add(meta((M, N), x_dtype), s, b, SCALE)


def quantize_4bit(op, x_dtype, R, a_dtype):
    for quant_type, block_size, _ in FORMATS:
        op.quantize_4bit(meta((N, K), x_dtype), quant_type, block_size)
    op.quantize_absmax(meta((N * K // 64,), FP32), meta((256,), FP32))


def dequantize_4bit(op, x_dtype, R, a_dtype):
    for quant_type, block_size, double in FORMATS:
        wide = meta((N, K + 16), x_dtype)
        for out in (meta((N, K), x_dtype), wide[:, :K], wide[:, : K - 16]):  # the last: blocks that span two rows
            op.dequantize_4bit(*packed_weight(block_size, double), quant_type, block_size, out)


def linear4bit_small(op, x_dtype, R, a_dtype):
    """Every count of rows that has a tile; the other formats, the biases and the smallest rank at one of them."""
    b = adapters(16, a_dtype)[1]
    for M in (1, 16, 32, 64):
        x, dy, s = meta((M, K), x_dtype), meta((M, N), x_dtype), meta((M, 16), x_dtype)
        for quant_type, block_size, double in FORMATS if M == 16 and a_dtype == FP32 else FORMATS[:1]:
            weight = (*packed_weight(block_size, double), quant_type, block_size)
            op.linear4bit_small(x, *weight, N, s, b, None, None, SCALE)
            op.linear4bit_small_dx(dy, *weight, K, meta((M, K), x_dtype))
    weight = (*packed_weight(64, True), "nf4", 64)
    op.linear4bit_small(x, *weight, N, meta((M, 64), x_dtype), adapters(64, a_dtype)[1], b[:, 0], b[:, 0], SCALE)
    if a_dtype == FP32:
        op.linear4bit_small(x, *weight, N, None, None, None, None, SCALE)
        op.linear4bit_small_dx(dy, *weight, K, None)


# (x dtype, adapter dtype, ranks): fp32 adapters on a bf16 base are the first-class case and meet every rank.
DTYPES = [
    (BF16, FP32, (16, 32, 64, 128, 256, 320)),
    (BF16, BF16, (16, 64)),
    (FP16, FP32, (16,)),
    (FP32, FP32, (16, 64, 256)),
]
CASES = {
    "lora_shrink": shrink, "lora_expand": expand, "lora_grad_b": grad_b, "lora_grad_a": grad_a,
    "lora_linear_fused": linear_fused, "quantize_4bit": quantize_4bit, "dequantize_4bit": dequantize_4bit,
    "linear4bit_small": linear4bit_small, "conv_shrink": convolution, "conv_grad_a": convolution,
}  # fmt: skip
OPS = ("_common", *CASES)
RANKLESS = {"quantize_4bit", "dequantize_4bit", "linear4bit_small"}  # which one call for each dtype covers
