// x wᵀ of bf16 rows with a 4-bit weight on vectors: W decoded 32 rows by 128 columns at a time into an L1 cache, for
// every row of x.
//
// 16 rows of 64 packed bytes are transposed as they are, so that a lane holds 8 nibbles of its own row of W; nibbles p
// of the two words of a lane are a pair of its columns, p and p + 4 of the eight. So a decoded vector is a step of two
// columns for 16 rows of W, x is a broadcast, nothing is summed across lanes, and absmax is one multiplication for the
// whole sum of a block. Compute-bound: 512 products of pairs against 16 sums to be scaled.
#pragma once
#include "simd/fourbit/gemv_nibbles.h"
#include "simd/transpose.h"

namespace {

constexpr int64_t kVectorWeightRows = 32;  // of W at a time
constexpr int64_t kVectorGroups = kVectorWeightRows / kLanes, kChunkSteps = kChunk / 2;
static_assert(kVectorGroups == 2, "a step has two vectors");
constexpr int64_t kTileRowsOfX = 6;  // with two vectors of W, 12 sums and as many totals in 32 registers
constexpr int64_t kLongestSum = 64;  // columns that are summed before absmax multiplies them

// f(first row, rows) over parts of M rows that are as equal as possible.
template <class F>
inline void for_parts(int64_t M, F f) {
  const int64_t parts = (M + kTileRowsOfX - 1) / kTileRowsOfX, base = M / parts, longer = M % parts;
  for (int64_t i = 0, m = 0; i < parts; ++i) {
    const int64_t rows = base + (i < longer);
    f(m, rows);
    m += rows;
  }
}

// Of 32 neighbouring values, the pairs of 16 steps.
constexpr Indices<uint16_t, 32> kPairsOfSteps([](int i) { return i / 8 * 8 + kPlaceOfPlane[i / 2 % 4] + i % 2 * 4; });

// [chunks, parts of rows, steps, rows of a part], pairs of columns; zero past the end. `order` puts 32 columns in the
// order of their steps.
template <class Order>
inline void pack_steps(const Rows& x, int64_t m0, int64_t m1, int64_t K, int64_t first, int64_t last, uint32_t* out,
                       Order order) {
  const int64_t M = m1 - m0;
  alignas(64) uint32_t steps[kTileRowsOfX][kChunkSteps];
  for (int64_t c = first; c < last; ++c)
    for_parts(M, [&](int64_t m, int64_t rows) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < kChunk; k += 32) {
          const int64_t left = K - c * kChunk - k;
          const uint16_t* from = static_cast<const uint16_t*>(x.data) + (m0 + m + i) * x.stride + c * kChunk + k;
          __m512i pairs = _mm512_maskz_loadu_epi16(left > 0 ? first_of_32(left) : 0u, from);
          order(pairs);
          store(steps[i] + k / 2, pairs);
        }
      uint32_t* to = out + (c * M + m) * kChunkSteps;
      for (int64_t s = 0; s < kChunkSteps; ++s)
        for (int64_t i = 0; i < rows; ++i) *to++ = steps[i][s];
    });
}

void vector_pack_forward(const Rows& x, int64_t m0, int64_t m1, int64_t K, int64_t first, int64_t last, uint32_t* out) {
  const __m512i places = _mm512_load_si512(kPairsOfSteps.at);
  pack_steps(x, m0, m1, K, first, last, out,
             [places](__m512i& pairs) { pairs = _mm512_permutexvar_epi16(places, pairs); });
}

// Rows of W, 32 at most, a chunk at a time.
struct TransposedRows {
  static constexpr int64_t kAhead = 2;  // chunks

  TransposedRows(const Packed& w, int64_t K, int64_t n0, int64_t n1)
      : codes(w.type), data(w.data + n0 * (K / 2)), row_bytes(K / 2), rows(n1 - n0) {}

  // The packed words of a chunk, each lane of another row.
  void transpose_chunk(int64_t chunk) {
    const int64_t left = row_bytes - chunk * (kChunk / 2);
    for (int64_t g = 0; g < kVectorGroups; ++g) {
      const uint8_t* from = data + g * kLanes * row_bytes + chunk * (kChunk / 2);
      __m512 v[kLanes];
      if (left >= kChunk / 2 && (g + 1) * kLanes <= rows) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          __builtin_prefetch(from + i * row_bytes + kAhead * (kChunk / 2), 0, 2);
          v[i] = _mm512_loadu_ps(from + i * row_bytes);
        }
      } else {
        for (int i = 0; i < kLanes; ++i) {
          const __mmask64 valid = g * kLanes + i < rows ? first_of_64(left) : 0;
          v[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(valid, from + i * row_bytes));
        }
      }
      transpose(v);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) words[j][g] = _mm512_castps_si512(v[j]);
    }
  }

  // The weights of a step, kept for other rows of x.
  inline __m512i decode(int64_t four, int plane, int64_t g) {
    const __m512i index = _mm512_srli_epi16(words[four][g], static_cast<unsigned>(4 * plane));
    return decoded[4 * four + plane][g] = _mm512_permutexvar_epi16(index, codes.table);
  }

  PairCodes codes;
  const uint8_t* data;
  int64_t row_bytes, rows;
  __m512i words[kChunkSteps / 4][kVectorGroups], decoded[kChunkSteps][kVectorGroups];
};

// absmax [rows, row_blocks] to [row_blocks, 32], times a factor.
inline void transpose_absmax(const float* absmax, int64_t row_blocks, int64_t rows, float factor, float* out) {
  for (int64_t g = 0; g < kVectorGroups; ++g)
    for (int64_t b = 0; b < row_blocks; b += kLanes) {
      __m512 v[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t r = g * kLanes + i;
        const __mmask16 valid = static_cast<__mmask16>(r < rows ? first_of_32(row_blocks - b) : 0u);
        v[i] = _mm512_mul_ps(_mm512_maskz_loadu_ps(valid, absmax + r * row_blocks + b), _mm512_set1_ps(factor));
      }
      transpose(v);
      for (int64_t i = 0; i < smaller(kLanes, row_blocks - b); ++i)
        store(out + (b + i) * kVectorWeightRows + g * kLanes, v[i]);
    }
}

// totals += x wᵀ for some rows of x and a chunk of W: `count` sums of `steps` each, multiplied by the absmax scales[i].
// The first rows of x decode W as they go: shifts and permutes issue on other ports than the products.
template <int Rows, bool Decode>
inline void forward_tile(const uint32_t* x, TransposedRows& w, int64_t count, int64_t steps, const float* const* scales,
                         float* totals) {
  vf all[kVectorGroups][Rows];
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
    for (int g = 0; g < kVectorGroups; ++g) all[g][m] = load<vf>(totals + m * kVectorWeightRows + g * kLanes);
  for (int64_t i = 0; i < count; ++i) {
    vf sum[kVectorGroups][Rows];
    clear(sum);
    const auto step = [&](const __m512i(&weights)[kVectorGroups]) {
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m) {
        const vu pair = vu{} + x[m];
        for (int g = 0; g < kVectorGroups; ++g) sum[g][m] = dot(sum[g][m], reinterpret_cast<vu>(weights[g]), pair);
      }
      x += Rows;
    };
    if constexpr (Decode) {
      for (int64_t four = i * steps / 4; four < (i + 1) * steps / 4; ++four)
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) step({w.decode(four, p, 0), w.decode(four, p, 1)});
    } else {
      for (int64_t s = i * steps; s < (i + 1) * steps; ++s) step(w.decoded[s]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m)
      for (int g = 0; g < kVectorGroups; ++g) all[g][m] += sum[g][m] * load<vf>(scales[i] + g * kLanes);
  }
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
    for (int g = 0; g < kVectorGroups; ++g) store(totals + m * kVectorWeightRows + g * kLanes, all[g][m]);
}

template <bool Decode>
constexpr decltype(&forward_tile<1, Decode>) kForwardTiles[kTileRowsOfX] = {
    forward_tile<1, Decode>, forward_tile<2, Decode>, forward_tile<3, Decode>,
    forward_tile<4, Decode>, forward_tile<5, Decode>, forward_tile<6, Decode>};

void vector_forward(const uint32_t* x, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0,
                    int64_t n1, float* scratch, void* y, Type type, int64_t ldy) {
  const int64_t row_blocks = K / w.block_size, sum = smaller(w.block_size, kLongestSum);
  float* const scales = scratch;
  float* const totals = scratch + row_blocks * kVectorWeightRows;
  TransposedRows rows(w, K, n0, n1);
  transpose_absmax(absmax, row_blocks, n1 - n0, 1.0f / rows.codes.unit, scales);
  std::memset(totals, 0, static_cast<size_t>(M * kVectorWeightRows) * sizeof(float));
  for (int64_t k0 = 0; k0 < K; k0 += kChunk) {
    rows.transpose_chunk(k0 / kChunk);
    const int64_t count = smaller(kChunk, K - k0) / sum;
    const float* of_sums[kChunk / 32];
    for (int64_t i = 0; i < count; ++i) of_sums[i] = scales + (k0 + i * sum) / w.block_size * kVectorWeightRows;
    for_parts(M, [&](int64_t m, int64_t part) {
      const auto tile = m ? kForwardTiles<false>[part - 1] : kForwardTiles<true>[part - 1];
      tile(x + (k0 / kChunk * M + m) * kChunkSteps, rows, count, sum / 2, of_sums, totals + m * kVectorWeightRows);
    });
  }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = n0; n < n1; n += kLanes) {
      const vf v = load<vf>(totals + m * kVectorWeightRows + n - n0);
      if (type == Type::f32) store_some<Type::f32>(y, m * ldy + n, v, n1 - n);
      else store_some<Type::bf16>(y, m * ldy + n, v, n1 - n);
    }
}

int64_t vector_weight_rows(int64_t) { return kVectorWeightRows; }
int64_t vector_scratch(int64_t M, int64_t row_blocks) { return (M + row_blocks) * kVectorWeightRows; }

}  // namespace
