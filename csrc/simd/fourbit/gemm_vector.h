// x wᵀ of bf16 rows with a 4-bit weight on vectors: W decoded 32 rows by 128 columns at a time into an L1 cache, for every row of x.
//
// 16 rows of 64 packed bytes are transposed as they are, so that a lane holds 8 nibbles of its own row of W; nibble p of the two
// words of a lane are a pair of its columns, p and p + 4 of the eight. So a decoded vector is a step of two columns for 16 rows
// of W, x is a broadcast, nothing is summed across lanes, and a block's absmax is one multiplication for its whole sum.
// Compute-bound: 512 products of pairs against 16 sums to be scaled.
#pragma once
#include "simd/fourbit/gemv_nibbles.h"
#include "simd/transpose.h"

namespace {

// Rows of x at a time: with two vectors of W, 12 sums and as many totals in 32 registers.
constexpr int64_t kMostRows = 6;
constexpr int64_t kSteps = kChunk / 2, kGroups = kBlockedWeights / kLanes;
static_assert(kGroups == 2, "a step has two vectors");
constexpr int64_t kLongest = 64;  // columns that are summed before absmax multiplies them

// f(first row, rows) over parts of M rows as equal as can be.
template <class F>
inline void for_parts(int64_t M, F f) {
  const int64_t parts = (M + kMostRows - 1) / kMostRows, least = M / parts, more = M % parts;
  for (int64_t i = 0, m = 0; i < parts; ++i) {
    const int64_t rows = least + (i < more);
    f(m, rows);
    m += rows;
  }
}

// Of 32 values in a row, the pairs of 16 steps.
constexpr Indices<uint16_t, 32> kPairsOfSteps([](int i) { return i / 8 * 8 + kPlaceOfPlane[i / 2 % 4] + i % 2 * 4; });

// [chunks, parts of rows, steps, rows of a part], pairs of columns; zero past the end. `order` puts 32 columns in the order of their steps.
template <class Order>
inline void arrange_steps(const Rows& x, int64_t m0, int64_t m1, int64_t K, int64_t first, int64_t last, uint32_t* out, Order order) {
  const int64_t M = m1 - m0;
  alignas(64) uint32_t steps[kMostRows][kSteps];
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
      uint32_t* to = out + (c * M + m) * kSteps;
      for (int64_t s = 0; s < kSteps; ++s)
        for (int64_t i = 0; i < rows; ++i) *to++ = steps[i][s];
    });
}

void arrange_blocks_forward(const Rows& x, int64_t m0, int64_t m1, int64_t K, int64_t first, int64_t last, uint32_t* out) {
  const __m512i places = _mm512_load_si512(kPairsOfSteps.at);
  arrange_steps(x, m0, m1, K, first, last, out, [places](__m512i& pairs) { pairs = _mm512_permutexvar_epi16(places, pairs); });
}

// At most kBlockedWeights rows of W.
struct BlockedRows {
  static constexpr int64_t kAhead = 2;  // lines

  BlockedRows(const Packed& w, int64_t K, int64_t n0, int64_t n1)
      : codes(w.type), data(w.data + n0 * (K / 2)), row_bytes(K / 2), rows(n1 - n0) {}

  // The words of a chunk, each lane of which is of another row.
  void gather(int64_t chunk) {
    const int64_t left = row_bytes - chunk * (kChunk / 2);
    for (int64_t g = 0; g < kGroups; ++g) {
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
          const __mmask64 own = g * kLanes + i < rows ? first_of_64(left) : 0;
          v[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(own, from + i * row_bytes));
        }
      }
      transpose(v);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) words[j][g] = _mm512_castps_si512(v[j]);
    }
  }

  // Of the words to those of a step, kept for other rows of x.
  inline __m512i decode(int64_t four, int plane, int64_t g) {
    return at[4 * four + plane][g] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[four][g], static_cast<unsigned>(4 * plane)), codes.table);
  }

  PairCodes codes;
  const uint8_t* data;
  int64_t row_bytes, rows;
  __m512i words[kSteps / 4][kGroups], at[kSteps][kGroups];
};

// Blocks of absmax [rows, row_blocks] to [row_blocks, kBlockedWeights], times a factor.
inline void turn_absmax(const float* absmax, int64_t row_blocks, int64_t rows, float factor, float* out) {
  for (int64_t g = 0; g < kGroups; ++g)
    for (int64_t b = 0; b < row_blocks; b += kLanes) {
      __m512 v[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t r = g * kLanes + i;
        const __mmask16 own = static_cast<__mmask16>(r < rows ? first_of_32(row_blocks - b) : 0u);
        v[i] = _mm512_mul_ps(_mm512_maskz_loadu_ps(own, absmax + r * row_blocks + b), _mm512_set1_ps(factor));
      }
      transpose(v);
      for (int64_t i = 0; i < smaller(kLanes, row_blocks - b); ++i) store(out + (b + i) * kBlockedWeights + g * kLanes, v[i]);
    }
}

// totals += x wᵀ for some rows of x and a chunk of W: `count` sums of `steps` each, of which scales[i] is the absmax. The first rows decode
// it on their way: shifts and permutations are not for the ports of products.
template <int Rows, bool Decode>
inline void block_part(const uint32_t* x, BlockedRows& w, int64_t count, int64_t steps, const float* const* scales, float* totals) {
  vf all[kGroups][Rows];
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
    for (int g = 0; g < kGroups; ++g) all[g][m] = load<vf>(totals + m * kBlockedWeights + g * kLanes);
  for (int64_t i = 0; i < count; ++i) {
    vf sum[kGroups][Rows];
    clear(sum);
    const auto step = [&](const __m512i (&weights)[kGroups]) {
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m) {
        const vu pair = vu{} + x[m];
        for (int g = 0; g < kGroups; ++g) sum[g][m] = dot(sum[g][m], reinterpret_cast<vu>(weights[g]), pair);
      }
      x += Rows;
    };
    if constexpr (Decode) {
      for (int64_t four = i * steps / 4; four < (i + 1) * steps / 4; ++four)
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) step({w.decode(four, p, 0), w.decode(four, p, 1)});
    } else {
      for (int64_t s = i * steps; s < (i + 1) * steps; ++s) step(w.at[s]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m)
      for (int g = 0; g < kGroups; ++g) all[g][m] += sum[g][m] * load<vf>(scales[i] + g * kLanes);
  }
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
    for (int g = 0; g < kGroups; ++g) store(totals + m * kBlockedWeights + g * kLanes, all[g][m]);
}

template <bool Decode>
constexpr decltype(&block_part<1, Decode>) kBlockParts[kMostRows] = {block_part<1, Decode>, block_part<2, Decode>, block_part<3, Decode>,
                                                                     block_part<4, Decode>, block_part<5, Decode>, block_part<6, Decode>};

void blocks_forward(const uint32_t* x, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1, float* room, void* y,
                    Type type, int64_t ldy) {
  const int64_t row_blocks = K / w.block_size, each = smaller(w.block_size, kLongest);
  float* const scales = room;
  float* const totals = room + row_blocks * kBlockedWeights;
  BlockedRows rows(w, K, n0, n1);
  turn_absmax(absmax, row_blocks, n1 - n0, 1.0f / rows.codes.unit, scales);
  std::memset(totals, 0, static_cast<size_t>(M * kBlockedWeights) * sizeof(float));
  for (int64_t k0 = 0; k0 < K; k0 += kChunk) {
    rows.gather(k0 / kChunk);
    const int64_t count = smaller(kChunk, K - k0) / each;
    const float* of_sums[kChunk / 32];
    for (int64_t i = 0; i < count; ++i) of_sums[i] = scales + (k0 + i * each) / w.block_size * kBlockedWeights;
    for_parts(M, [&](int64_t m, int64_t part) {
      const auto product = m ? kBlockParts<false>[part - 1] : kBlockParts<true>[part - 1];
      product(x + (k0 / kChunk * M + m) * kSteps, rows, count, each / 2, of_sums, totals + m * kBlockedWeights);
    });
  }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = n0; n < n1; n += kLanes) {
      const vf v = load<vf>(totals + m * kBlockedWeights + n - n0);
      if (type == Type::f32) store_some<Type::f32>(y, m * ldy + n, v, n1 - n);
      else store_some<Type::bf16>(y, m * ldy + n, v, n1 - n);
    }
}

}  // namespace
