// The products of bf16_reduce.h on the tile registers of AMX-BF16, 16 rows by 16 columns by 16 pairs at a time.
//
// The pairs of a panel are already in the order of a right tile, and rows of x in that of a left one. Fewer than 16
// rows are left to the vectors.
#pragma once
#include "simd/amx.h"
#include "simd/lora/bf16_pack.h"

namespace {

// s[m, 16] += x panel for 16 · Blocks rows: the sums are in tiles 0 to Blocks - 1, x goes through tile 6, the panel
// through 7.
template <int Blocks>
struct TileReduce {
  const uint16_t* x;
  int64_t ldx, steps;
  const uint32_t* panel;
  int64_t ldp;
  float* s;
  int64_t lds;

  template <int T>
  void start() const {
    if constexpr (T < Blocks) {
      tile_load<T>(s + T * kTileRows * lds, 4 * lds);
      start<T + 1>();
    }
  }
  template <int T>
  void step(const uint16_t* at) const {
    if constexpr (T < Blocks) {
      tile_load<6>(at + T * kTileRows * ldx, 2 * ldx);
      tile_dot<T, 6, 7>();
      step<T + 1>(at);
    }
  }
  template <int T>
  void finish() const {
    if constexpr (T < Blocks) {
      tile_store<T>(s + T * kTileRows * lds, 4 * lds);
      finish<T + 1>();
    }
  }
  void run() const {
    start<0>();
    for (int64_t i = 0; i < steps; ++i) {
      tile_load<7>(panel + i * kTilePairs * ldp, 4 * ldp);
      step<0>(x + i * 2 * kTilePairs);
    }
    finish<0>();
  }
};

// s[m, lds] += x[m, 32 · steps] panel for whole groups of 16 rows. Returns the number of these rows.
inline int64_t tile_reduce(const uint16_t* x, int64_t ldx, int64_t rows, int64_t steps, const uint32_t* panel,
                           int64_t ldp, float* s, int64_t lds) {
  constexpr int kBlocks = 6;
  for (int64_t r = 0; r < lds; r += kTileRows) {
    int64_t m = 0;
    for (; m + kBlocks * kTileRows <= rows; m += kBlocks * kTileRows)
      TileReduce<kBlocks>{x + m * ldx, ldx, steps, panel + r, ldp, s + m * lds + r, lds}.run();
    for (; m + 2 * kTileRows <= rows; m += 2 * kTileRows)
      TileReduce<2>{x + m * ldx, ldx, steps, panel + r, ldp, s + m * lds + r, lds}.run();
    for (; m + kTileRows <= rows; m += kTileRows)
      TileReduce<1>{x + m * ldx, ldx, steps, panel + r, ldp, s + m * lds + r, lds}.run();
  }
  return rows / kTileRows * kTileRows;
}

// The left factor of a weight gradient: the pairs of rows of every rank, padded with zeros to whole tiles.
struct RankRows {
  static constexpr int64_t kPairs = kRows / 2;
  void fill(const uint32_t* pairs, int64_t ld, int64_t count, int64_t ranks) {
    steps = (count + kTilePairs - 1) / kTilePairs;
    for (int64_t r = 0; r < (ranks + kTileRows - 1) / kTileRows * kTileRows; ++r) {
      for (int64_t i = 0; i < count; ++i) at[r * kPairs + i] = r < ranks ? pairs[i * ld + r] : 0u;
      for (int64_t i = count; i < steps * kTilePairs; ++i) at[r * kPairs + i] = 0u;
    }
  }
  int64_t steps;
  alignas(64) uint32_t at[64 * kPairs];
};

// 32 columns of the rows of x as pairs of rows, for two tiles: of every 8 columns (128 bits) the pairs of the first 4
// go to one tile, those of the last 4 to the other. Shuffles within 128 bits are three times as fast as permutations of
// whole vectors.
inline void tile_strip(const uint16_t* x, int64_t ldx, int64_t rows, __mmask32 columns, uint32_t* strip) {
  for (int64_t m = 0; m < rows; m += 2, strip += 2 * kTilePairs) {
    const __m512i one = _mm512_maskz_loadu_epi16(columns, x + m * ldx);
    const __m512i two = m + 1 < rows ? _mm512_maskz_loadu_epi16(columns, x + (m + 1) * ldx) : _mm512_setzero_si512();
    _mm512_store_si512(strip, _mm512_unpacklo_epi16(one, two));
    _mm512_store_si512(strip + kTilePairs, _mm512_unpackhi_epi16(one, two));
  }
}

// grad[r, n] += the sum over pairs of rows, for the n <= 32 columns of a strip.
inline void tile_grad(const RankRows& left, int64_t R, const uint32_t* strip, int64_t n, float* grad, int64_t ldg) {
  alignas(64) float sums[2][kTileRows][kTilePairs];
  alignas(64) static constexpr uint32_t kFirst[16] = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
  const __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t r = 0; r < R; r += kTileRows) {
    tile_zero<0>();
    tile_zero<1>();
    for (int64_t i = 0; i < left.steps; ++i) {
      tile_load<2>(left.at + r * RankRows::kPairs + i * kTilePairs, 4 * RankRows::kPairs);
      tile_load<3>(strip + i * kTilePairs * 32, 4 * 32);
      tile_dot<0, 2, 3>();
      tile_load<4>(strip + i * kTilePairs * 32 + kTilePairs, 4 * 32);
      tile_dot<1, 2, 4>();
    }
    tile_store<0>(sums[0], 64);
    tile_store<1>(sums[1], 64);
    for (int64_t i = 0; i < smaller(kTileRows, R - r); ++i) {
      float* out = grad + (r + i) * ldg;
      const __m512 low = _mm512_load_ps(sums[0][i]), high = _mm512_load_ps(sums[1][i]);
      _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), _mm512_permutex2var_ps(low, first, high)));
      if (n <= kTilePairs) continue;
      out += kTilePairs;
      _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), _mm512_permutex2var_ps(low, second, high)));
    }
  }
}

// As pair_grads of bf16_reduce.h.
inline void tile_grads(const RankRows& left, int64_t R, const uint16_t* x, int64_t ldx, int64_t rows, int64_t n,
                       float* grad, int64_t ldg) {
  alignas(64) uint32_t strip[kRows / 2 * 2 * kTilePairs];
  const int64_t written = (rows + 1) / 2 * 2 * kTilePairs;
  std::memset(strip + written, 0, static_cast<size_t>(left.steps * kTilePairs * 2 * kTilePairs - written) * 4);
  for (int64_t c = 0; c < n; c += 32) {
    tile_strip(x + c, ldx, rows, first_of_32(n - c), strip);
    tile_grad(left, R, strip, n - c, grad + c, ldg);
  }
}

}  // namespace
