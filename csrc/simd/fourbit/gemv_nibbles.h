// The product of a few rows of x with a 4-bit weight as it is stored.
//
// A vector of packed bytes holds 8 nibbles in each 32-bit lane. Nibble p of all lanes makes one vector of weights, a
// plane: shifted right by 4p, the low bits of a lane are the index of a permutation of the code table, which ignores
// the other bits. So the sum over k runs in another order, and x is packed in that order once. The sum of each block is
// multiplied by its absmax. For products of bf16 pairs a lane holds 2 x 4 nibbles, of 16-bit words.
#pragma once
#include "simd/convert.h"
#include "simd/fourbit/codes.h"

namespace {

constexpr int64_t kVectorWeights = 8 * kLanes;  // of a vector of nibbles

// Where the weights of plane p stand in a word of 4 nibbles: the first of a byte is the high one.
constexpr int kPlaceOfPlane[4] = {1, 0, 3, 2};

#if FP_ISA >= 3
// Of each plane: where its 32 words stand among the 64 values of two vectors, twice.
constexpr Indices<uint16_t, 128> kPlaces([](int i) { return i % 16 * 4 + kPlaceOfPlane[i / 32]; });

// `count` of 128 values, zeros after them, to planes.
inline void to_planes(const uint16_t* from, int64_t count, __m512i (&planes)[4]) {
  __m512i v[4];
  for (int q = 0; q < 4; ++q)
    v[q] = _mm512_maskz_loadu_epi16(count > 32 * q ? first_of_32(count - 32 * q) : 0u, from + 32 * q);
  for (int p = 0; p < 4; ++p) {
    const __m512i places = _mm512_load_si512(kPlaces.at + 32 * p);
    const __m512i low = _mm512_permutex2var_epi16(v[0], places, v[1]),
                  high = _mm512_permutex2var_epi16(v[2], places, v[3]);
    planes[p] = _mm512_shuffle_i64x2(low, high, 0x44);
  }
}

void pack_pairs_of_planes(const Rows& x, int64_t K, void* out) {
  uint16_t* to = static_cast<uint16_t*>(out);
  for (int64_t m = 0; m < x.count; ++m)
    for (int64_t k = 0; k < K; k += kChunk, to += kChunk) {
      __m512i planes[4];
      to_planes(static_cast<const uint16_t*>(x.data) + m * x.stride + k, K - k, planes);
      for (int p = 0; p < 4; ++p) store(to + 32 * p, planes[p]);
    }
}
#endif

void pack_planes(const Rows& x, int64_t K, void* out) {
  float* to = static_cast<float*>(out);
  for (int64_t m = 0; m < x.count; ++m)
    for (int64_t k0 = 0; k0 < whole_chunks(K); k0 += kVectorWeights) {
      const int64_t base = m * x.stride + k0, n = K - k0;
      for (int p = 0; p < 8; ++p)
        for (int64_t j = 0; j < kLanes; ++j)
          *to++ = 8 * j < n ? scalar_to_float(x.data, x.type, base + 8 * j + (p ^ 1)) : 0.0f;
    }
}

// absmax of the `Blocks` blocks of a vector of nibbles, each to its lanes; or of the one block of several such vectors.
template <int Blocks>
struct BlockScales {
  explicit BlockScales(int64_t block_size) {
    while (kVectorWeights << shift < block_size) ++shift;
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i * Blocks / kLanes);
  }
  vf at(const float* row, int64_t vector) const {
    if constexpr (Blocks == 1) return splat(row[vector >> shift]);
    const float* p = row + vector * Blocks;
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

#if FP_ISA >= 3
struct PairProduct {  // bf16
  static constexpr int kPlanes = 4;
  static constexpr int64_t kElement = 2;
  explicit PairProduct(FourBit type) : codes(type) {}
  vu plane(vu bytes, int p) const {
    typedef uint16_t words __attribute__((vector_size(64)));
    const words shifted = reinterpret_cast<words>(bytes) >> (4 * p);
    return reinterpret_cast<vu>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(shifted), codes.table));
  }
  vf add(vf sum, vu weights, const void* x) const { return dot(sum, weights, load<vu>(x)); }
  vf in_ones(vf sum) const { return sum * splat(1.0f / codes.unit); }
  PairCodes codes;
};
#endif

struct FloatProduct {
  static constexpr int kPlanes = 8;
  static constexpr int64_t kElement = 4;
  explicit FloatProduct(FourBit type) : table(code_of(type)) {}
  vu plane(vu bytes, int p) const { return reinterpret_cast<vu>(table.at(bytes >> (4 * p))); }
  vf add(vf sum, vu weights, const void* x) const { return sum + reinterpret_cast<vf>(weights) * load<vf>(x); }
  vf in_ones(vf sum) const { return sum; }
  Table table;
};

// A number of rows as a type: a template that is passed as a function pointer would not be inlined.
template <int N>
struct Count {
  static constexpr int value = N;
};

// MR rows of x by NR rows of W, which are `apart` from each other.
template <class P, class S, int MR, int NR>
inline void nibbles_tile(const P& product, const S& scales, const char* x, int64_t ldx, int64_t K, const uint8_t* w,
                         int64_t apart, const float* absmax, int64_t row_blocks, float* y, int64_t ldy) {
  constexpr int64_t plane = 4 * kLanes;
  vf acc[NR][MR];
  clear(acc);
  const auto step = [&](const vu(&bytes)[NR], const vf(&factor)[NR], const char* at) {
    vu weights[NR][P::kPlanes];
#pragma GCC unroll 8
    for (int p = 0; p < P::kPlanes; ++p)
      for (int n = 0; n < NR; ++n) weights[n][p] = product.plane(bytes[n], p);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      vf sum[NR] = {};
#pragma GCC unroll 8
      for (int p = 0; p < P::kPlanes; ++p)
        for (int n = 0; n < NR; ++n) sum[n] = product.add(sum[n], weights[n][p], at + m * ldx + p * plane);
      for (int n = 0; n < NR; ++n) acc[n][m] += sum[n] * factor[n];
    }
  };
  vu bytes[NR];
  vf factor[NR];
  const int64_t whole = K / kVectorWeights;
  for (int64_t c = 0; c < whole; ++c) {
    for (int n = 0; n < NR; ++n) {
      const uint8_t* from = w + n * apart * (K / 2) + c * (kVectorWeights / 2);
      __builtin_prefetch(from + K / 2);  // the next row
      bytes[n] = load<vu>(from);
      factor[n] = scales.at(absmax + n * apart * row_blocks, c);
    }
    step(bytes, factor, x + c * P::kPlanes * plane);
  }
  if (whole * kVectorWeights < K) {  // only where a block is smaller than a vector
    for (int n = 0; n < NR; ++n) {
      alignas(64) uint8_t rest[kVectorWeights / 2] = {};
      std::memcpy(rest, w + n * apart * (K / 2) + whole * (kVectorWeights / 2),
                  static_cast<size_t>((K - whole * kVectorWeights) / 2));
      bytes[n] = load<vu>(rest);
      alignas(64) float rest_absmax[kChunk / 32] = {};
      const float* row = absmax + n * apart * row_blocks;
      for (int64_t b = whole * scales.blocks; b < row_blocks; ++b) rest_absmax[b - whole * scales.blocks] = row[b];
      factor[n] = scales.at(rest_absmax, 0);
    }
    step(bytes, factor, x + whole * P::kPlanes * plane);
  }
  for (int m = 0; m < MR; ++m) {
    if constexpr (NR == 2)
      totals(product.in_ones(acc[0][m]), product.in_ones(acc[1][m]), y[m * ldy], y[m * ldy + apart]);
    else y[m * ldy] = total(product.in_ones(acc[0][m]));
  }
}

template <class P, class S, int NR>
inline void nibbles_rows(const P& product, const S& scales, const char* x, int64_t M, int64_t K, const uint8_t* w,
                         int64_t apart, const float* absmax, int64_t row_blocks, float* y, int64_t ldy) {
  const int64_t ldx = whole_chunks(K) * P::kElement;
  const auto at = [&](auto rows, int64_t m) {
    constexpr int MR = decltype(rows)::value;
    nibbles_tile<P, S, MR, NR>(product, scales, x + m * ldx, ldx, K, w, apart, absmax, row_blocks, y + m * ldy, ldy);
  };
  int64_t m = 0;
  for (; m + 8 <= M; m += 8) at(Count<8>{}, m);
  for (; m + 4 <= M; m += 4) at(Count<4>{}, m);
  for (; m + 2 <= M; m += 2) at(Count<2>{}, m);
  for (; m < M; ++m) at(Count<1>{}, m);
}

// Two rows of W at a time, one from each half of the rows: the hardware's prefetcher follows two long runs, and loses
// the many short ones of neighbours.
template <class P, int Blocks>
void nibbles_as(const void* x, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1,
                float* y, int64_t ldy) {
  const P product(w.type);
  const BlockScales<Blocks> scales(w.block_size);
  const int64_t row_blocks = K / w.block_size, half = (n1 - n0) / 2;
  const char* rows = static_cast<const char*>(x);
  const auto run = [&](auto of_w, int64_t n, int64_t apart) {
    constexpr int NR = decltype(of_w)::value;
    nibbles_rows<P, BlockScales<Blocks>, NR>(product, scales, rows, M, K, w.data + n * (K / 2), apart,
                                             absmax + (n - n0) * row_blocks, row_blocks, y + n, ldy);
  };
  for (int64_t n = n0; n < n0 + half; ++n) run(Count<2>{}, n, half);
  for (int64_t n = n0 + 2 * half; n < n1; ++n) run(Count<1>{}, n, 0);
}

template <class P>
void multiply_nibbles(const void* x, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1,
                      float* y, int64_t ldy) {
  const auto as = w.block_size >= kVectorWeights       ? nibbles_as<P, 1>
                  : w.block_size == kVectorWeights / 2 ? nibbles_as<P, 2>
                                                       : nibbles_as<P, 4>;
  as(x, M, K, w, absmax, n0, n1, y, ldy);
}

}  // namespace
