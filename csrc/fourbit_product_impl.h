// The product of a few rows of x with a 4-bit weight as it is stored, for one instruction set.
//
// A vector of packed bytes holds 8 nibbles in each 32-bit lane. Nibble p of all lanes makes one vector of weights: shifted
// right by 4p, the low bits of a lane are the index that a permutation of the table takes, and the others it ignores. So
// the sum over k runs in another order, and x is put in that order once (`arrange`). The sum of each block is multiplied
// by its absmax. With products of bf16 pairs a lane holds 2 x 4 nibbles of 16-bit words.
#pragma once
#include "fourbit_table_impl.h"

namespace {

constexpr int64_t kChunk = 8 * kLanes;  // weights of a vector of nibbles

bool product_in_pairs(Type x) { return FP_ISA == 3 && x == Type::bf16; }

int64_t few_rows(Type x) {
  if (product_in_pairs(x)) return 32;
  return FP_ISA >= 2 ? 24 : FP_ISA == 1 ? 16 : 4;
}

void arrange(Rows x, int64_t K, void* out) {
  const int64_t ld = arranged(K);
  for (int64_t m = 0; m < x.count; ++m)
    for (int64_t k0 = 0; k0 < ld; k0 += kChunk) {
      const int64_t base = m * x.stride + k0, n = smaller(kChunk, K - k0);
      if (product_in_pairs(x.type)) {
        uint16_t* row = static_cast<uint16_t*>(out) + m * ld + k0;
        const uint16_t* from = static_cast<const uint16_t*>(x.data) + base;
        static constexpr int kAt[4] = {1, 0, 3, 2};
        for (int p = 0; p < 4; ++p)
          for (int64_t j = 0; j < kChunk / 4; ++j) row[p * (kChunk / 4) + j] = 4 * j < n ? from[4 * j + kAt[p]] : uint16_t{0};
      } else {
        float* row = static_cast<float*>(out) + m * ld + k0;
        for (int p = 0; p < 8; ++p)
          for (int64_t j = 0; j < kLanes; ++j) row[p * kLanes + j] = 8 * j < n ? scalar_to_float(x.data, x.type, base + 8 * j + (p ^ 1)) : 0.0f;
      }
    }
}

// absmax of the blocks of one chunk, each to its lanes.
struct BlockScales {
  explicit BlockScales(int64_t block_size) : blocks(block_size < kChunk ? kChunk / block_size : 1), chunks(block_size < kChunk ? 1 : block_size / kChunk) {
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i * blocks / kLanes);
  }
  vf at(const float* row, int64_t chunk) const {
    if (blocks == 1) return splat(row[chunk / chunks]);
    const float* p = row + chunk * blocks;
    vf v;
#if FP_ISA >= 2
    if (blocks == 2) {
      int64_t two;
      std::memcpy(&two, p, 8);
      return reinterpret_cast<vf>(_mm512_permutevar_ps(_mm512_castsi512_ps(_mm512_set1_epi64(two)), reinterpret_cast<__m512i>(lane)));
    }
    return reinterpret_cast<vf>(_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(p)), reinterpret_cast<__m512i>(lane)));
#else
    for (int i = 0; i < kLanes; ++i) v[i] = p[lane[i]];
#endif
    return v;
  }
  int64_t blocks, chunks;
  vu lane;
};

struct PairProduct {  // bf16
  static constexpr int kPlanes = 4;
  static constexpr int64_t kElement = 2;
#if FP_ISA == 3
  explicit PairProduct(FourBit type) {
    const vh code = reinterpret_cast<vh>(_mm512_cvtneps_pbh(_mm512_load_ps(code_of(type))));
    alignas(64) uint16_t twice[32];
    store(twice, code);
    store(twice + 16, code);
    table = _mm512_load_si512(twice);
  }
  vu plane(vu bytes, int p) const {
    typedef uint16_t words __attribute__((vector_size(64)));
    return reinterpret_cast<vu>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(reinterpret_cast<words>(bytes) >> (4 * p)), table));
  }
  vf add(vf sum, vu weights, const void* x) const { return dot(sum, weights, load<vu>(x)); }
  __m512i table;
#else
  explicit PairProduct(FourBit) {}
  vu plane(vu bytes, int) const { return bytes; }
  vf add(vf sum, vu, const void*) const { return sum; }
#endif
};

struct FloatProduct {
  static constexpr int kPlanes = 8;
  static constexpr int64_t kElement = 4;
  explicit FloatProduct(FourBit type) : table(code_of(type)) {}
  vu plane(vu bytes, int p) const { return reinterpret_cast<vu>(table.at(bytes >> (4 * p))); }
  vf add(vf sum, vu weights, const void* x) const { return sum + reinterpret_cast<vf>(weights) * load<vf>(x); }
  Table table;
};

template <class P, int MR, int NR>
inline void product_tile(const P& by, const BlockScales& scales, const char* x, int64_t ldx, int64_t K, const uint8_t* w, const float* absmax,
                         int64_t row_blocks, float* y, int64_t ldy) {
  constexpr int64_t plane = 4 * kLanes;
  vf acc[NR][MR];
  clear(acc);
  const auto step = [&](const vu (&bytes)[NR], const vf (&factor)[NR], const char* at) {
    vu weights[NR][P::kPlanes];
#pragma GCC unroll 8
    for (int p = 0; p < P::kPlanes; ++p)
      for (int n = 0; n < NR; ++n) weights[n][p] = by.plane(bytes[n], p);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      vf sum[NR] = {};
#pragma GCC unroll 8
      for (int p = 0; p < P::kPlanes; ++p)
        for (int n = 0; n < NR; ++n) sum[n] = by.add(sum[n], weights[n][p], at + m * ldx + p * plane);
      for (int n = 0; n < NR; ++n) acc[n][m] += sum[n] * factor[n];
    }
  };
  vu bytes[NR];
  vf factor[NR];
  const int64_t whole = K / kChunk;
  for (int64_t c = 0; c < whole; ++c) {
    for (int n = 0; n < NR; ++n) {
      const uint8_t* from = w + n * (K / 2) + c * (kChunk / 2);
      __builtin_prefetch(from + NR * (K / 2));  // the rows after these: the hardware's prefetcher starts anew at every row
      bytes[n] = load<vu>(from);
      factor[n] = scales.at(absmax + n * row_blocks, c);
    }
    step(bytes, factor, x + c * P::kPlanes * plane);
  }
  if (whole * kChunk < K) {  // and then a block is smaller than a chunk
    for (int n = 0; n < NR; ++n) {
      alignas(64) uint8_t rest[kChunk / 2] = {};
      std::memcpy(rest, w + n * (K / 2) + whole * (kChunk / 2), static_cast<size_t>((K - whole * kChunk) / 2));
      bytes[n] = load<vu>(rest);
      alignas(64) float own[kNibbles / 32] = {};
      for (int64_t b = whole * scales.blocks; b < row_blocks; ++b) own[b - whole * scales.blocks] = absmax[n * row_blocks + b];
      factor[n] = scales.at(own, 0);
    }
    step(bytes, factor, x + whole * P::kPlanes * plane);
  }
  for (int n = 0; n < NR; ++n)
    for (int m = 0; m < MR; ++m) y[m * ldy + n] = total(acc[n][m]);
}

template <class P, int NR>
inline void product_rows(const P& by, const BlockScales& scales, const char* x, int64_t M, int64_t K, const uint8_t* w, const float* absmax,
                         int64_t row_blocks, float* y, int64_t ldy) {
  const int64_t ldx = arranged(K) * P::kElement;
  int64_t m = 0;
  for (; m + 8 <= M; m += 8) product_tile<P, 8, NR>(by, scales, x + m * ldx, ldx, K, w, absmax, row_blocks, y + m * ldy, ldy);
  for (; m + 4 <= M; m += 4) product_tile<P, 4, NR>(by, scales, x + m * ldx, ldx, K, w, absmax, row_blocks, y + m * ldy, ldy);
  for (; m + 2 <= M; m += 2) product_tile<P, 2, NR>(by, scales, x + m * ldx, ldx, K, w, absmax, row_blocks, y + m * ldy, ldy);
  for (; m < M; ++m) product_tile<P, 1, NR>(by, scales, x + m * ldx, ldx, K, w, absmax, row_blocks, y + m * ldy, ldy);
}

template <class P>
void product_as(const void* x, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1, float* y, int64_t ldy) {
  const P by(w.type);
  const BlockScales scales(w.block_size);
  const int64_t row_blocks = K / w.block_size;
  const char* rows = static_cast<const char*>(x);
  int64_t n = n0;
  for (; n + 2 <= n1; n += 2)
    product_rows<P, 2>(by, scales, rows, M, K, w.data + n * (K / 2), absmax + (n - n0) * row_blocks, row_blocks, y + n, ldy);
  for (; n < n1; ++n)
    product_rows<P, 1>(by, scales, rows, M, K, w.data + n * (K / 2), absmax + (n - n0) * row_blocks, row_blocks, y + n, ldy);
}

void product(const void* x, bool pairs, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1, float* y,
             int64_t ldy) {
  (pairs ? product_as<PairProduct> : product_as<FloatProduct>)(x, M, K, w, absmax, n0, n1, y, ldy);
}

}  // namespace
