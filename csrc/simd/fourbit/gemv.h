// FourBitGemv of one instruction set: a few rows of x with a 4-bit weight as it is stored.
#pragma once
#include "simd/fourbit/gemv_nibbles.h"
#ifdef FP_TILES
#include "simd/fourbit/gemv_bytes.h"
#endif

namespace {

inline bool multiplies_pairs(Type x) { return FP_ISA >= 3 && x == Type::bf16; }

int64_t gemv_max_rows(Type x, int64_t block_size) {
#ifdef FP_TILES
  if (multiplies_pairs(x)) return block_size >= kRun ? kByteRows : 32;
#endif
  if (multiplies_pairs(x)) return 8;
  return FP_ISA >= 2 ? 24 : FP_ISA == 1 ? 16 : 4;
}

GemvFormat gemv_pack(const Rows& x, int64_t K, int64_t block_size, void* out) {
#ifdef FP_TILES
  if (x.type == Type::bf16 && block_size >= kRun && x.count <= kByteRows && pack_bytes(x, K, out))
    return GemvFormat::bytes;
#endif
#if FP_ISA >= 3
  if (x.type == Type::bf16) {
    pack_pairs_of_planes(x, K, out);
    return GemvFormat::pairs;
  }
#endif
  pack_planes(x, K, out);
  return GemvFormat::floats;
}

void gemv_multiply(GemvFormat format, const void* x, int64_t M, int64_t K, const Packed& w, const float* absmax,
                   int64_t n0, int64_t n1, float* y, int64_t ldy) {
  switch (format) {
#ifdef FP_TILES
    case GemvFormat::bytes: return multiply_bytes(x, M, K, w, absmax, n0, n1, y, ldy);
#endif
#if FP_ISA >= 3
    case GemvFormat::pairs: return multiply_nibbles<PairProduct>(x, M, K, w, absmax, n0, n1, y, ldy);
#endif
    default: return multiply_nibbles<FloatProduct>(x, M, K, w, absmax, n0, n1, y, ldy);
  }
}

constexpr FourBitGemv kGemv = {gemv_max_rows, gemv_pack, gemv_multiply};

}  // namespace
