// What the products of bf16 rows with a 4-bit weight on the tile registers of AMX-BF16 share.
//
// 64 packed bytes of a row are 128 weights: as 32 words of 4 nibbles, they are four vectors (planes) of 32 weights, each a shift
// and a permutation of the table of code · absmax, rounded once as where the weight is dequantised. A plane is a row of a left
// tile as it is (x wᵀ), or, where the words of two rows of W stand in turn, of a right tile (dy w). So a weight is decoded once, to
// an L1 cache, for up to kTiledGroup rows of x, which are put in the order of the planes.
#pragma once
#include "fourbit_product_impl.h"
#include "transpose_impl.h"

namespace {

constexpr int kPlanes = 4;
constexpr int64_t kTileFloats = kTileRows * kTilePairs;

// The words of two halves, in turn.
constexpr struct PairsOfRows {
  constexpr PairsOfRows() : at() {
    for (int j = 0; j < 32; ++j) at[j] = static_cast<uint16_t>(j % 2 * 16 + j / 2);
  }
  alignas(64) uint16_t at[32];
} kPairsOfRows;

// 128 nibbles of 32 words to planes; words of the second kind (`upper`, bit 4 of an index) are multiplied by another absmax.
struct TileDecoder {
  TileDecoder(FourBit type, __mmask32 second)
      : code(_mm512_load_ps(code_of(type))), upper(_mm512_mask_set1_epi16(_mm512_setzero_si512(), second, 16)) {}

  void planes(__m512i words, float first, float other, __m512i (&out)[kPlanes]) const {
    const __m512i table = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(_mm512_mul_ps(code, _mm512_set1_ps(other)), _mm512_mul_ps(code, _mm512_set1_ps(first))));
    const __m512i low = _mm512_set1_epi16(15);
    // (word & 15) | upper
    const auto plane = [&](__m512i index) { return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(index, low, upper, 0xEA), table); };
    out[0] = plane(words);
    out[1] = plane(_mm512_srli_epi16(words, 4));
    out[2] = plane(_mm512_srli_epi16(words, 8));
    out[3] = plane(_mm512_srli_epi16(words, 12));
  }

  __m512 code;
  __m512i upper;
};

inline int64_t chunks_of(int64_t K) { return (K + kTiledWeights - 1) / kTiledWeights; }
inline int64_t tiles_of(int64_t n) { return (n + kTileRows - 1) / kTileRows; }

// 16 values from column n on to a row of y, at most `count`.
inline void put_16(__m512 v, void* y, Type type, int64_t at, int64_t count) {
  const __mmask16 own = static_cast<__mmask16>(first_of_32(count));
  if (type == Type::f32) _mm512_mask_storeu_ps(static_cast<float*>(y) + at, own, v);
  else _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at, own, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}

// Tiles 0 to 3 hold sums, four at once: the next product of one has to wait for its last.
template <int T = 0>
inline void sums_start(const float* from) {
  if constexpr (T < 4) {
    if (from) tile_load<T>(from + T * kTileFloats, 64);
    else tile_zero<T>();
    sums_start<T + 1>(from);
  }
}
template <int T = 0>
inline void sums_store(float* to) {
  if constexpr (T < 4) {
    tile_store<T>(to + T * kTileFloats, 64);
    sums_store<T + 1>(to);
  }
}

}  // namespace
