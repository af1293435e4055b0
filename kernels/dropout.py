"""The dropout mask: a pure function of (seed, row, column), drawn in registers wherever it is applied, never stored.

    words = Philox4x32-7((column >> 3, row mod 2³², row >> 32, 0), seed)          fastpeft/reference/dropout.py
    draw  = 15 low bits of half (column & 1) of word (column & 7) >> 1
    keep  = draw >= dropped, or draw < 32768 - dropped where dropped = round(32768 p) is more than 0x7c00

One call serves eight adjacent columns, which are the 16 bytes of a half-precision row that a thread loads and stores at
once: the mask is drawn in the layout of the loads, and goes where the matrix units want it as vectors of 16 bytes.
Two adjacent columns are the halves of one word. As 15-bit numbers order like the fp16 numbers of the same bits, one
packed comparison of fp16 makes two masks of 16 bits, and one AND drops two elements: an instruction an element, where
16-bit draws of eight columns 32 apart took six, and a store of two bytes each (docs/measured.md, "On a GPU"). NaN,
the bits above 0x7c00, compares as larger than any number; a probability beyond 31/32, whose threshold would be NaN
itself, counts from the other end.
Philox-4x32: Salmon et al. 2011, doi:10.1145/2063384.2063405.
"""

import os

import torch
import triton
import triton.language as tl

LEVELS = 32768  # of a draw
# Triton's interpreter runs no assembly, and AMD's has other words: there the same in integers, five instructions more.
_PACKED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1" and torch.version.hip is None)


def dropout_args(p):
    """(threshold, 1 / keep): p rounded to 1/32768, and the factor of exactly that probability."""
    threshold = min(max(round(p * LEVELS), 0), LEVELS - 1)
    return threshold, LEVELS / (LEVELS - threshold)


@triton.jit
def _philox(seed, calls, rows):
    """The four words, uint32 [rows, calls]; both halves of a product from one wide multiply."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = calls[None, :].to(tl.uint32)
    c1 = (rows & 0xFFFFFFFF)[:, None].to(tl.uint32)
    c2 = (rows >> 32)[:, None].to(tl.uint32)
    c3 = c2 * 0
    for _ in tl.static_range(7):
        one, two = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (two >> 32).to(tl.uint32) ^ c1 ^ k0, (one >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = two.to(tl.uint32), one.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _keep_pairs(words, least, below):
    """Of each word's two draws 0xffff where it is `least` or more, or less with `below`; the other half of bits 0."""
    if _PACKED:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .pred below;
                .reg .b32 draws;
                setp.ne.b32 below, $3, 0;
                abs.f16x2 draws, $1;
                set.geu.xor.u32.f16x2 $0, draws, $2, below;
            }
            """, "=r,r,r,r", [words, least * 0x10001, below], dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        kept = (((words & 0x7FFF7FFF) + (0x8000 - least) * 0x10001) >> 15 ^ below) & 0x00010001
        return kept * 0xFFFF


@triton.jit
def _keep_words(seed, rows, first, threshold, COLS: tl.constexpr):
    """The masks of a call's eight columns as the halves of four words, uint32 [rows, COLS // 8]."""
    rare = threshold > 0x7C00
    least = tl.where(rare, 32768 - threshold, threshold).to(tl.uint32)
    below = tl.where(rare, 0x00010001, 0).to(tl.uint32)
    w0, w1, w2, w3 = _philox(seed, (first >> 3) + tl.arange(0, COLS // 8), rows)
    w0, w1 = _keep_pairs(w0, least, below), _keep_pairs(w1, least, below)
    w2, w3 = _keep_pairs(w2, least, below), _keep_pairs(w3, least, below)
    return w0, w1, w2, w3


@triton.jit
def keep_tile(seed, rows, first, threshold, COLS: tl.constexpr):
    """int16 [rows, COLS]: -1 where rows (int64) keep columns first .. first + COLS, else 0; both multiples of 8."""
    w0, w1, w2, w3 = _keep_words(seed, rows, first, threshold, COLS)
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(rows.shape[0], COLS // 2)
    return tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).reshape(rows.shape[0], COLS)


@triton.jit
def keep_bytes(seed, rows, first, threshold, COLS: tl.constexpr):
    """The same as bits of uint8 [rows, COLS // 8]: for the tile of a GEMM, which has time to spare and no registers."""
    w0, w1, w2, w3 = _keep_words(seed, rows, first, threshold, COLS)
    pairs = (w0 & 0x00020001) | (w1 & 0x00080004) | (w2 & 0x00200010) | (w3 & 0x00800040)
    return (pairs | (pairs >> 16)).to(tl.uint8)


@triton.jit
def drop(values, keep):
    """`values`, zero where not kept; of 16 bits an AND of two at a time, NaN and infinity included."""
    if values.dtype.primitive_bitwidth == 16:
        return (values.to(tl.int16, bitcast=True) & keep).to(values.dtype, bitcast=True)
    else:
        return (values.to(tl.int32, bitcast=True) & keep.to(tl.int32)).to(values.dtype, bitcast=True)
