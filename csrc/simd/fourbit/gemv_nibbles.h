// The product of a few rows of x with a 4-bit weight as it is stored, for one instruction set.
//
// A vector of packed bytes holds 8 nibbles in each 32-bit lane. Nibble p of all lanes makes one vector of weights: shifted
// right by 4p, the low bits of a lane are the index that a permutation of the table takes, and the others it ignores. So
// the sum over k runs in another order, and x is put in that order once (`arrange`). The sum of each block is multiplied
// by its absmax. With products of bf16 pairs a lane holds 2 x 4 nibbles of 16-bit words.
#pragma once
#include "simd/fourbit/codes.h"

namespace {

constexpr int64_t kChunk = 8 * kLanes;  // weights of a vector of nibbles

// The place in its word of 4 nibbles of the vector that it makes: the first of a byte is the high one.
constexpr int kPlaceOfPlane[4] = {1, 0, 3, 2};

bool product_in_pairs(Type x) { return FP_ISA == 3 && x == Type::bf16; }

int64_t few_rows(Type x) {
#ifdef FP_TILES
  if (product_in_pairs(x)) return 32;
#else
  if (product_in_pairs(x)) return 8;  // and then blocks
#endif
  return FP_ISA >= 2 ? 24 : FP_ISA == 1 ? 16 : 4;
}

#if FP_ISA >= 3
// Of a plane: where its 32 words stand among the 64 values of two vectors, twice.
constexpr Indices<uint16_t, 128> kPlaces([](int i) { return i % 16 * 4 + kPlaceOfPlane[i / 32]; });

// `count` of 128 values, zeros after them, to planes.
inline void to_planes(const uint16_t* from, int64_t count, __m512i (&planes)[4]) {
  __m512i v[4];
  for (int q = 0; q < 4; ++q) v[q] = _mm512_maskz_loadu_epi16(count > 32 * q ? first_of_32(count - 32 * q) : 0u, from + 32 * q);
  for (int p = 0; p < 4; ++p) {
    const __m512i places = _mm512_load_si512(kPlaces.at + 32 * p);
    const __m512i low = _mm512_permutex2var_epi16(v[0], places, v[1]), high = _mm512_permutex2var_epi16(v[2], places, v[3]);
    planes[p] = _mm512_shuffle_i64x2(low, high, 0x44);
  }
}
#endif

void arrange(Rows x, int64_t K, void* out) {
  const int64_t ld = arranged(K);
  for (int64_t m = 0; m < x.count; ++m)
    for (int64_t k0 = 0; k0 < ld; k0 += kChunk) {
      const int64_t base = m * x.stride + k0, n = smaller(kChunk, K - k0);
#if FP_ISA >= 3
      if (product_in_pairs(x.type)) {
        __m512i planes[4];
        to_planes(static_cast<const uint16_t*>(x.data) + base, n, planes);
        for (int p = 0; p < 4; ++p) store(static_cast<uint16_t*>(out) + m * ld + k0 + 32 * p, planes[p]);
        continue;
      }
#endif
      float* row = static_cast<float*>(out) + m * ld + k0;
      for (int p = 0; p < 8; ++p)
        for (int64_t j = 0; j < kLanes; ++j) row[p * kLanes + j] = 8 * j < n ? scalar_to_float(x.data, x.type, base + 8 * j + (p ^ 1)) : 0.0f;
    }
}

// absmax of the `Blocks` blocks of a chunk, each to its lanes; of one block, which can be one of several chunks.
template <int Blocks>
struct BlockScales {
  explicit BlockScales(int64_t block_size) {
    while (kChunk << shift < block_size) ++shift;
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i * Blocks / kLanes);
  }
  vf at(const float* row, int64_t chunk) const {
    if constexpr (Blocks == 1) return splat(row[chunk >> shift]);
    const float* p = row + chunk * Blocks;
#if FP_ISA >= 2
    __m512 all;
    if constexpr (Blocks == 2) {
      int64_t two;
      std::memcpy(&two, p, 8);
      all = _mm512_castsi512_ps(_mm512_set1_epi64(two));
    } else {
      all = _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    }
    return reinterpret_cast<vf>(_mm512_permutevar_ps(all, reinterpret_cast<__m512i>(lane)));
#else
    vf v;
    for (int i = 0; i < kLanes; ++i) v[i] = p[lane[i]];
    return v;
#endif
  }
  static constexpr int64_t blocks = Blocks;
  int shift = 0;
  vu lane;
};

struct PairProduct {  // bf16
  static constexpr int kPlanes = 4;
  static constexpr int64_t kElement = 2;
#if FP_ISA == 3
  explicit PairProduct(FourBit type) : codes(type) {}
  vu plane(vu bytes, int p) const {
    typedef uint16_t words __attribute__((vector_size(64)));
    return reinterpret_cast<vu>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(reinterpret_cast<words>(bytes) >> (4 * p)), codes.table));
  }
  vf add(vf sum, vu weights, const void* x) const { return dot(sum, weights, load<vu>(x)); }
  vf in_ones(vf sum) const { return sum * splat(1.0f / codes.unit); }
  PairCodes codes;
#else
  explicit PairProduct(FourBit) {}
  vu plane(vu bytes, int) const { return bytes; }
  vf add(vf sum, vu, const void*) const { return sum; }
  vf in_ones(vf sum) const { return sum; }
#endif
};

struct FloatProduct {
  static constexpr int kPlanes = 8;
  static constexpr int64_t kElement = 4;
  explicit FloatProduct(FourBit type) : table(code_of(type)) {}
  vu plane(vu bytes, int p) const { return reinterpret_cast<vu>(table.at(bytes >> (4 * p))); }
  vf add(vf sum, vu weights, const void* x) const { return sum + reinterpret_cast<vf>(weights) * load<vf>(x); }
  vf in_ones(vf sum) const { return sum; }
  Table table;
};

// For NR rows of W, `apart` from each other.
template <class P, class S, int MR, int NR>
inline void product_tile(const P& by, const S& scales, const char* x, int64_t ldx, int64_t K, const uint8_t* w, int64_t apart,
                         const float* absmax, int64_t row_blocks, float* y, int64_t ldy) {
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
      const uint8_t* from = w + n * apart * (K / 2) + c * (kChunk / 2);
      __builtin_prefetch(from + K / 2);  // of the next row of the run
      bytes[n] = load<vu>(from);
      factor[n] = scales.at(absmax + n * apart * row_blocks, c);
    }
    step(bytes, factor, x + c * P::kPlanes * plane);
  }
  if (whole * kChunk < K) {  // and then a block is smaller than a chunk
    for (int n = 0; n < NR; ++n) {
      alignas(64) uint8_t rest[kChunk / 2] = {};
      std::memcpy(rest, w + n * apart * (K / 2) + whole * (kChunk / 2), static_cast<size_t>((K - whole * kChunk) / 2));
      bytes[n] = load<vu>(rest);
      alignas(64) float own[kNibbles / 32] = {};
      for (int64_t b = whole * scales.blocks; b < row_blocks; ++b) own[b - whole * scales.blocks] = absmax[n * apart * row_blocks + b];
      factor[n] = scales.at(own, 0);
    }
    step(bytes, factor, x + whole * P::kPlanes * plane);
  }
  for (int m = 0; m < MR; ++m) {
    if constexpr (NR == 2) totals(by.in_ones(acc[0][m]), by.in_ones(acc[1][m]), y[m * ldy], y[m * ldy + apart]);
    else y[m * ldy] = total(by.in_ones(acc[0][m]));
  }
}

template <class P, class S, int NR>
inline void product_rows(const P& by, const S& scales, const char* x, int64_t M, int64_t K, const uint8_t* w, int64_t apart,
                         const float* absmax, int64_t row_blocks, float* y, int64_t ldy) {
  const int64_t ldx = arranged(K) * P::kElement;
  int64_t m = 0;
  for (; m + 8 <= M; m += 8) product_tile<P, S, 8, NR>(by, scales, x + m * ldx, ldx, K, w, apart, absmax, row_blocks, y + m * ldy, ldy);
  for (; m + 4 <= M; m += 4) product_tile<P, S, 4, NR>(by, scales, x + m * ldx, ldx, K, w, apart, absmax, row_blocks, y + m * ldy, ldy);
  for (; m + 2 <= M; m += 2) product_tile<P, S, 2, NR>(by, scales, x + m * ldx, ldx, K, w, apart, absmax, row_blocks, y + m * ldy, ldy);
  for (; m < M; ++m) product_tile<P, S, 1, NR>(by, scales, x + m * ldx, ldx, K, w, apart, absmax, row_blocks, y + m * ldy, ldy);
}

// Two rows of W at a time, each the next of its half: so the hardware's prefetcher sees two runs, where of neighbours it sees many short ones.
template <class P, int Blocks>
void product_as(const void* x, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1, float* y, int64_t ldy) {
  const P by(w.type);
  const BlockScales<Blocks> scales(w.block_size);
  const int64_t row_blocks = K / w.block_size, half = (n1 - n0) / 2;
  const char* rows = static_cast<const char*>(x);
  for (int64_t n = n0; n < n0 + half; ++n)
    product_rows<P, BlockScales<Blocks>, 2>(by, scales, rows, M, K, w.data + n * (K / 2), half, absmax + (n - n0) * row_blocks, row_blocks, y + n, ldy);
  for (int64_t n = n0 + 2 * half; n < n1; ++n)
    product_rows<P, BlockScales<Blocks>, 1>(by, scales, rows, M, K, w.data + n * (K / 2), 0, absmax + (n - n0) * row_blocks, row_blocks, y + n, ldy);
}

template <class P>
void product_of(const void* x, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1, float* y, int64_t ldy) {
  const auto as = w.block_size >= kChunk ? product_as<P, 1> : w.block_size == kChunk / 2 ? product_as<P, 2> : product_as<P, 4>;
  as(x, M, K, w, absmax, n0, n1, y, ldy);
}

void product(const void* x, bool pairs, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1, float* y,
             int64_t ldy) {
  (pairs ? product_of<PairProduct> : product_of<FloatProduct>)(x, M, K, w, absmax, n0, n1, y, ldy);
}

}  // namespace
