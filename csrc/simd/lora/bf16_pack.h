// pack of simd/kernels.h for the products of bf16 pairs.
#pragma once
#include "simd/bf16.h"
#include "simd/convert.h"
#include "simd/transpose.h"
#ifdef FP_TILES
#include "simd/amx.h"
#endif

namespace {

// Up to this rank, a vector of 16 lanes holds two pairs for every column of a panel ("folded").
#ifdef FP_TILES
constexpr int64_t kFoldRank = 0;
#else
constexpr int64_t kFoldRank = 8;
#endif
// The number of ranks whose pairs of rows are kept at once, and the largest rank that is served.
constexpr int64_t kPairRanks = 64, kMaxPairRank = 1024;

// Whether a panel for this type of x, dy or y and this rank is packed in pairs.
inline bool in_pairs(Type type, int64_t R) { return type == Type::bf16 && R <= kMaxPairRank; }

#ifdef FP_TILES
// The number of pairs that tiles read of a panel: whole tiles, unless there is only one. It fits the size of a panel in
// fp32.
inline int64_t tiled_pairs(int64_t pairs) {
  return pairs < kTilePairs ? pairs : (pairs + kTilePairs - 1) / kTilePairs * kTilePairs;
}
#endif

// The place of bf16 (i, j) in a panel.
inline int64_t pair_at(int64_t i, int64_t j, int64_t ld, bool fold) {
  return fold ? ((i >> 2) * ld + 2 * j + ((i >> 1) & 1)) * 2 + (i & 1) : ((i >> 1) * ld + j) * 2 + (i & 1);
}

// out[i / 2, j] = (src[j, i], src[j, i + 1]) for i < inner and j < outer, 16 by 16 pairs at a time. Rows of src are
// `step` apart.
template <Type T>
void pack_pairs_down(const void* src, int64_t step, int64_t outer, int64_t inner, uint32_t* out, int64_t ld) {
  for (int64_t j = 0; j < outer; j += kLanes)
    for (int64_t i = 0; i < inner; i += 2 * kLanes) {
      __m512 pairs[kLanes];
      for (int t = 0; t < kLanes; ++t) {
        const int64_t rest = j + t < outer ? inner - i : 0, at = (j + t) * step + i;
        const vf low = rest > 0 ? load_some<T>(src, at, rest) : vf{},
                 high = rest > kLanes ? load_some<T>(src, at + kLanes, rest - kLanes) : vf{};
        pairs[t] = reinterpret_cast<__m512>(
            _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
      }
      transpose(pairs);
      const int64_t count = smaller(kLanes, (inner - i + 1) / 2);
      for (int64_t k = 0; k < count; ++k) _mm512_storeu_ps(out + (i / 2 + k) * ld + j, pairs[k]);
    }
}

// out[i / 2, j] = (src[i, j], src[i + 1, j]) for i < outer and j < inner.
template <Type T>
void pack_pairs_across(const void* src, int64_t step, int64_t outer, int64_t inner, uint32_t* out, int64_t ld) {
  for (int64_t i = 0; i < outer; i += 2)
    for (int64_t j = 0; j < inner; j += kLanes) {
      vu pair = low_halves(load_some<T>(src, i * step + j, inner - j));
      if (i + 1 < outer) pair |= low_halves(load_some<T>(src, (i + 1) * step + j, inner - j)) << 16;
      store(out + i / 2 * ld + j, pair);
    }
}

// out[i / 2, j] = column j of src rows i and i + 1; pairs past `rows` and columns past `cols` are zero. With `fold`,
// out[i / 4, 2 j + (i / 2) % 2] instead, which fills the 16 lanes of a vector at a rank of at most 8.
template <Type T>
void pack_pairs(const Strided& src, int64_t rows, int64_t cols, bool fold, uint32_t* out, int64_t ld) {
#ifdef FP_TILES
  const int64_t groups = tiled_pairs((rows + 1) / 2);
#else
  const int64_t span = fold ? 4 : 2, groups = (rows + span - 1) / span;
#endif
  std::memset(out, 0, static_cast<size_t>(groups * ld) * 4);
  const bool down = src.row == 1 && src.col != 1;  // pairs along the contiguous dimension
  const int64_t outer = down ? cols : rows, inner = down ? rows : cols;
  const int64_t step = down ? src.col : src.row, next = down ? src.row : src.col;
  if (next == 1 && !fold)
    return (down ? pack_pairs_down<T> : pack_pairs_across<T>)(src.data, step, outer, inner, out, ld);
  alignas(64) uint16_t line[kCols];
  uint16_t* half = reinterpret_cast<uint16_t*>(out);
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t i0 = 0; i0 < inner; i0 += kCols) {
      const int64_t n = smaller(kCols, inner - i0);
      for (int64_t i = 0; i < n; i += kLanes) {
        vf v;
        if (next == 1) {
          v = load_some<T>(src.data, o * step + i0 + i, n - i);
        } else {
          alignas(64) float part[kLanes] = {};
          for (int64_t j = 0; j < smaller(kLanes, n - i); ++j)
            part[j] = scalar_to_float(src.data, T, o * step + (i0 + i + j) * next);
          v = load<vf>(part);
        }
        store(line + i, reinterpret_cast<vh>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v))));
      }
      if (!down) {
        uint16_t* to = half + pair_at(o, i0, ld, fold);
        for (int64_t j = 0; j < n; ++j) to[j * (fold ? 4 : 2)] = line[j];
        continue;
      }
      for (int64_t i = 0; i + 1 < n; i += 2) std::memcpy(half + pair_at(i0 + i, o, ld, fold), line + i, 4);
      if (n % 2) half[pair_at(i0 + n - 1, o, ld, fold)] = line[n - 1];
    }
}

// Columns [0, n) of fp32 [rows, ld] as pairs of rows, [rows / 2, kPairRanks].
inline void pair_rows(const float* src, int64_t rows, int64_t ld, int64_t n, uint32_t* out) {
  for (int64_t m = 0; m < rows; m += 2)
    for (int64_t j = 0; j < n; j += kLanes) {
      vu pair = low_halves(load<vf>(src + m * ld + j));
      if (m + 1 < rows) pair |= low_halves(load<vf>(src + (m + 1) * ld + j)) << 16;
      store(out + (m >> 1) * kPairRanks + j, pair);
    }
}

}  // namespace
