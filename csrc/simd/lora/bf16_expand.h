// expand of simd/kernels.h on bf16, by AVX-512-BF16: sums over pairs of ranks; y is written, or read and written, once.
#pragma once
#include "simd/lora/bf16_reduce.h"

namespace {

// Writes 32 masked sums to a row of y, or adds them.
inline void store_expanded(vf first, vf second, const uint8_t* bits, bool add, uint16_t* out, __mmask32 columns) {
  const __mmask32 keep = kept(bits, 0);
  if (add) {
    const __m512i old = _mm512_maskz_loadu_epi16(columns, out);
    first = widen(_mm512_castsi512_si256(old)) + masked_by(first, static_cast<__mmask16>(keep));
    second = widen(_mm512_extracti64x4_epi64(old, 1)) + masked_by(second, static_cast<__mmask16>(keep >> 16));
  }
  __m512i rounded =
      reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
  if (bits && !add) rounded = _mm512_maskz_mov_epi16(keep, rounded);
  // A masked store of 16-bit elements is microcode on Zen 4.
  if (columns == 0xffffffffu) _mm512_storeu_si512(out, rounded);
  else _mm512_mask_storeu_epi16(out, columns, rounded);
}

// y[MR rows, at most 32 columns] = mask(bias + s b); with ADD, += the same.
template <int MR, bool ONE>
inline void pair_expand_tile(const uint32_t* s, int64_t steps, const uint32_t* panel, int64_t ldp, const float* bias,
                             Bits mask, int64_t m0, int64_t n0, bool add, uint16_t* y, int64_t stride,
                             __mmask32 columns) {
  constexpr int NV = ONE ? 1 : 2;
  vf acc[MR][NV], start[NV] = {};
  clear(acc);
  for (int m = 0; m < MR; ++m) __builtin_prefetch(y + m * stride + 64, 1, 2);
  for (int64_t i = 0; i < steps; ++i) {
    vu row[NV];
    for (int v = 0; v < NV; ++v) row[v] = load<vu>(panel + i * ldp + v * kLanes);
    for (int m = 0; m < MR; ++m) {
      const vu pair = broadcast_pair(s + i * kPairRows + m);
      for (int v = 0; v < NV; ++v) acc[m][v] = dot(acc[m][v], row[v], pair);
    }
  }
  if (bias)
    for (int v = 0; v < NV; ++v) start[v] = load<vf>(bias + v * kLanes);
#pragma GCC unroll 16  // a runtime index would put the sums on the stack
  for (int m = 0; m < MR; ++m) {
    vf second = vf{};
    if constexpr (!ONE) second = acc[m][1] + start[1];
    store_expanded(acc[m][0] + start[0], second, mask.row(m0 + m, n0), add, y + m * stride, columns);
  }
}

template <int MR, bool ONE>
inline void pair_expand_rows(int64_t& m, const uint32_t* s, int64_t rows, int64_t steps, const uint32_t* panel,
                             int64_t ldp, const float* bias, Bits mask, int64_t m0, int64_t n0, bool add, uint16_t* y,
                             int64_t stride, __mmask32 columns) {
  for (; m + MR <= rows; m += MR)
    pair_expand_tile<MR, ONE>(s + m, steps, panel, ldp, bias, mask, m0 + m, n0, add, y + m * stride, stride, columns);
}

template <bool ONE>
inline void pair_expand(const uint32_t* s, int64_t rows, int64_t steps, const uint32_t* panel, int64_t ldp,
                        const float* bias, Bits mask, int64_t m0, int64_t n0, bool add, uint16_t* y, int64_t stride,
                        __mmask32 columns) {
  int64_t m = 0;
  pair_expand_rows<kPairRows, ONE>(m, s, rows, steps, panel, ldp, bias, mask, m0, n0, add, y, stride, columns);
  pair_expand_rows<4, ONE>(m, s, rows, steps, panel, ldp, bias, mask, m0, n0, add, y, stride, columns);
  pair_expand_rows<1, ONE>(m, s, rows, steps, panel, ldp, bias, mask, m0, n0, add, y, stride, columns);
}

// One row of scale · s as pairs of ranks.
inline void rank_pairs(const float* s, int64_t R, float scale, uint32_t* out) {
  for (int64_t r = 0; r < R; r += kLanes) {
    // Past R there may be anything, and the last pair of an odd rank multiplies it by zero: a NaN would survive.
    const __mmask16 valid = static_cast<__mmask16>(first_of_32(R - r));
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(valid, s + r), _mm512_set1_ps(scale));
    store(out + r / 2, reinterpret_cast<vh>(_mm512_cvtneps_pbh(v)));
  }
}

#ifdef FP_TILES
// With fewer rows in a task, vectors are faster than tiles.
constexpr int64_t kMinTiledRows = 8;

// 32 rows by 32 columns of y at a time: the sums are in tiles 0 to 3, s goes through 4 and 5, the panel through 6
// and 7.
void expand_tiles(const float* s, int64_t lds, int64_t rows, int64_t R, const uint32_t* panel, int64_t ldp,
                  const float* bias, float scale, Bits mask, bool add, uint16_t* y, int64_t stride, int64_t width) {
  constexpr int64_t kGroup = 2 * kTileRows;
  alignas(64) uint32_t pairs[kGroup * kMaxPairRank / 2];
  alignas(64) float sums[kGroup][kGroup];
  const int64_t steps = tiled_pairs((R + 1) / 2), ldl = (steps + kLanes / 2 - 1) / (kLanes / 2) * (kLanes / 2);
  const int one = static_cast<int>(smaller(steps, kTilePairs));
  TileShapes shapes = full_tiles();
  shapes.set(4, 6, kTileRows, one);
  shapes.set(6, 8, one, kTilePairs);
  const Tiles tiles(shapes);
  std::memset(pairs, 0, static_cast<size_t>(kGroup * ldl) * 4);
  for (int64_t m = 0; m < rows; m += kGroup) {
    const int64_t count = smaller(kGroup, rows - m);
    for (int64_t i = 0; i < count; ++i) rank_pairs(s + (m + i) * lds, R, scale, pairs + i * ldl);
    const auto left = [&](int64_t step) {
      tile_load<4>(pairs + step, 4 * ldl);
      tile_load<5>(pairs + kTileRows * ldl + step, 4 * ldl);
    };
    left(0);
    for (int64_t n = 0; n < width; n += kGroup) {
      const bool both = width - n > kLanes;
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      for (int64_t step = 0; step < steps; step += kTilePairs) {
        if (steps > kTilePairs) left(step);
        tile_load<6>(panel + step * ldp + n, 4 * ldp);
        tile_dot<0, 4, 6>();
        tile_dot<2, 5, 6>();
        if (!both) continue;
        tile_load<7>(panel + step * ldp + n + kLanes, 4 * ldp);
        tile_dot<1, 4, 7>();
        tile_dot<3, 5, 7>();
      }
      tile_store<0>(sums[0], 4 * kGroup);
      tile_store<1>(sums[0] + kLanes, 4 * kGroup);
      tile_store<2>(sums[kTileRows], 4 * kGroup);
      tile_store<3>(sums[kTileRows] + kLanes, 4 * kGroup);
      const __mmask32 columns = first_of_32(width - n);
      uint16_t* out = y + m * stride + n;
      if (add && !mask.data && !bias && columns == 0xffffffffu) {  // the usual case, without branches in its loop
        for (int64_t i = 0; i < count; ++i, out += stride) {
          __builtin_prefetch(out + kGroup, 1);  // the next block; the one after it would cost 5.8 ns a line, this 4.7
          store_expanded(load<vf>(sums[i]), load<vf>(sums[i] + kLanes), nullptr, true, out, 0xffffffffu);
        }
        continue;
      }
      vf start[2] = {};
      for (int v = 0; bias && v < 1 + both; ++v) start[v] = load<vf>(bias + n + v * kLanes);
      for (int64_t i = 0; i < count; ++i, out += stride) {
        __builtin_prefetch(out + kGroup, 1);
        store_expanded(load<vf>(sums[i]) + start[0], load<vf>(sums[i] + kLanes) + start[1], mask.row(m + i, n), add,
                       out, columns);
      }
    }
  }
}
#endif

void expand_pairs(const float* s, int64_t lds, int64_t m0, int64_t m1, int64_t R, const float* panel, int64_t ldp,
                  const float* bias, float scale, Bits mask, bool add, void* y, int64_t stride, int64_t width) {
#ifdef FP_TILES
  if (R && m1 - m0 >= kMinTiledRows)
    return expand_tiles(s, lds, m1 - m0, R, reinterpret_cast<const uint32_t*>(panel), ldp, bias, scale, mask, add,
                        static_cast<uint16_t*>(y) + m0 * stride, stride, width);
#endif
  alignas(64) uint32_t pairs[kMaxPairRank / 2 * kPairRows];  // [R / 2, rows]
  alignas(64) uint32_t line[kMaxPairRank / 2];
  const int64_t steps = (R + 1) / 2;
  for (int64_t m = m0; m < m1; m += kPairRows) {
    const int64_t rows = smaller(kPairRows, m1 - m);
    for (int64_t i = 0; i < rows; ++i) {
      rank_pairs(s + (m - m0 + i) * lds, R, scale, line);
      for (int64_t j = 0; j < steps; ++j) pairs[j * kPairRows + i] = line[j];
    }
    uint16_t* out = static_cast<uint16_t*>(y) + m * stride;
    for (int64_t n = 0; n < width; n += 32) {
      const auto tile = width - n > kLanes ? pair_expand<false> : pair_expand<true>;
      tile(pairs, rows, steps, reinterpret_cast<const uint32_t*>(panel) + n, ldp, bias ? bias + n : nullptr, mask,
           m - m0, n, add, out + n, stride, first_of_32(width - n));
    }
  }
}

}  // namespace
