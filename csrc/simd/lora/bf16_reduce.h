// reduce of simd/kernels.h on bf16 read in place, by AVX-512-BF16: two multiplications a lane, sums in fp32.
//
// Sums run over pairs of neighbours, a 32-bit lane for every pair: along the long dimension in reduce, the rows in
// grad, the rank in expand. The thin operand is packed in pairs (`pack_pairs`) and rounded to bf16, as in any product
// of bf16 tensors. x, dy and y are read and written in place, without a copy in fp32.
#pragma once
#include "simd/lora/bf16_pack.h"
#include "simd/lora/dropout.h"
#ifdef FP_TILES
#include "simd/lora/bf16_amx.h"
#endif

namespace {

constexpr int kPairRows = 12, kPairGradRows = 8;
// Whether a block prefetches the next one. On processors with tiles the hardware's prefetcher alone is faster (3.1
// against 3.7 ns a line of 2048 x 768): there 16 software requests at a time wait for an L3, and the hardware's
// overtake them.
#ifdef FP_TILES
constexpr bool kAsksAhead = false;
#else
constexpr bool kAsksAhead = true;
#endif
// The row stride of the copy of a block, in bf16: an odd number of cache lines.
constexpr int64_t kPairLead = kCols + 32;

// s += the block's share for MR rows and NV vectors of ranks. While a cache line of every row is multiplied, the line
// `ahead` of it is prefetched. Requested in one burst, the lines would queue, as a core can wait for only a few at a
// time.
template <int MR, int NV, bool FOLD>
inline void pair_tile(const uint16_t* x, int64_t ldx, int64_t ahead, int64_t steps, const uint32_t* panel, int64_t ldp,
                      float* s, int64_t lds) {
  constexpr int64_t line = FOLD ? 8 : 16, step = FOLD ? 4 : 2;
  // One pointer for three rows, as far as scaled indices reach: twelve pointers would not stay in registers.
  const uint16_t* three[(MR + 2) / 3];
  for (int m = 0; m < MR; m += 3) three[m / 3] = x + m * ldx;
  vf acc[MR][NV];
  clear(acc);
  for (int64_t first = 0; first < steps; first += line) {
    if (ahead)
      for (int m = 0; m < MR; ++m) __builtin_prefetch(three[m / 3] + m % 3 * ldx + ahead, 0, 2);
    for (int64_t i = first; i < smaller(first + line, steps); ++i) {
      vu row[NV];
      for (int v = 0; v < NV; ++v) row[v] = load<vu>(panel + i * ldp + v * kLanes);
      for (int m = 0; m < MR; ++m) {
        const uint16_t* at = three[m / 3] + m % 3 * ldx;
        const vu pair = FOLD ? broadcast_two_pairs(at) : broadcast_pair(at);
        for (int v = 0; v < NV; ++v) acc[m][v] = dot(acc[m][v], row[v], pair);
      }
      for (int m = 0; m < MR; m += 3) three[m / 3] += step;
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) {
      float* out = s + m * lds + v * kLanes;
      store(out, load<vf>(out) + acc[m][v]);
    }
}

template <int NV, bool FOLD>
inline void pair_reduce(const uint16_t* x, int64_t ldx, int64_t ahead, int64_t rows, int64_t steps,
                        const uint32_t* panel, int64_t ldp, float* s, int64_t lds) {
  int64_t m = 0;
  for (; m + kPairRows <= rows; m += kPairRows)
    pair_tile<kPairRows, NV, FOLD>(x + m * ldx, ldx, ahead, steps, panel, ldp, s + m * lds, lds);
  for (; m + 4 <= rows; m += 4) pair_tile<4, NV, FOLD>(x + m * ldx, ldx, ahead, steps, panel, ldp, s + m * lds, lds);
  for (; m < rows; ++m) pair_tile<1, NV, FOLD>(x + m * ldx, ldx, ahead, steps, panel, ldp, s + m * lds, lds);
}

// 32 columns of x as pairs of rows, [rows / 2, 32].
inline void pair_strip(const uint16_t* x, int64_t ldx, int64_t ahead, int64_t rows, __mmask32 columns,
                       uint32_t* strip) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t m = 0; m < rows; m += 2, strip += 32) {
    if (ahead) {
      __builtin_prefetch(x + m * ldx + ahead, 0, 2);
      __builtin_prefetch(x + (m + 1) * ldx + ahead, 0, 2);
    }
    const __m512i one = _mm512_maskz_loadu_epi16(columns, x + m * ldx);
    const __m512i two = m + 1 < rows ? _mm512_maskz_loadu_epi16(columns, x + (m + 1) * ldx) : _mm512_setzero_si512();
    _mm512_store_si512(strip, _mm512_permutex2var_epi16(one, low, two));
    _mm512_store_si512(strip + 16, _mm512_permutex2var_epi16(one, high, two));
  }
}

// grad[r, columns] += the sum over pairs of rows; left holds pairs [pairs, ldl].
template <int MR, int NV>
inline void pair_grad_tile(const uint32_t* left, int64_t ldl, const uint32_t* strip, int64_t pairs, float* grad,
                           int64_t ldg) {
  vf acc[MR][NV];
  clear(acc);
  for (int64_t i = 0; i < pairs; ++i) {
    vu row[NV];
    for (int v = 0; v < NV; ++v) row[v] = load<vu>(strip + i * 32 + v * kLanes);
    for (int r = 0; r < MR; ++r) {
      const vu pair = broadcast_pair(left + i * ldl + r);
      for (int v = 0; v < NV; ++v) acc[r][v] = dot(acc[r][v], row[v], pair);
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NV; ++v) {
      float* out = grad + r * ldg + v * kLanes;
      store(out, load<vf>(out) + acc[r][v]);
    }
}

template <int NV>
inline void pair_grad(const uint32_t* left, int64_t ldl, int64_t R, const uint32_t* strip, int64_t pairs, float* grad,
                      int64_t ldg) {
  int64_t r = 0;
  for (; r + kPairGradRows <= R; r += kPairGradRows)
    pair_grad_tile<kPairGradRows, NV>(left + r, ldl, strip, pairs, grad + r * ldg, ldg);
  for (; r + 2 <= R; r += 2) pair_grad_tile<2, NV>(left + r, ldl, strip, pairs, grad + r * ldg, ldg);
  for (; r < R; ++r) pair_grad_tile<1, NV>(left + r, ldl, strip, pairs, grad + r * ldg, ldg);
}

inline void pair_grads(const uint32_t* left, int64_t ldl, int64_t R, const uint16_t* x, int64_t ldx, int64_t ahead,
                       int64_t rows, int64_t n, float* grad, int64_t ldg) {
  alignas(64) uint32_t strip[kRows / 2 * 32];
  for (int64_t c = 0; c < n; c += 32) {
    pair_strip(x + c, ldx, ahead, rows, first_of_32(n - c), strip);
    const auto tile = n - c > kLanes ? pair_grad<2> : pair_grad<1>;
    tile(left, ldl, R, strip, (rows + 1) / 2, grad + c, ldg);
  }
}

void reduce_pairs(const Rows& x, int64_t m0, int64_t m1, int64_t width, Bits mask, const float* panel, int64_t ldp,
                  int64_t R, float scale, float* s, const float* left, int64_t ldl, float* grad, int64_t ldg,
                  float* sums) {
  const int64_t rows = m1 - m0, lds = padded(R);
  const bool fold = R <= kFoldRank;
  alignas(64) uint16_t copy[kRows * kPairLead];
  alignas(64) uint32_t pairs[kRows / 2 * kPairRanks];
  alignas(64) static constexpr uint32_t kOnes[1] = {0x3f803f80u};
  const uint32_t* down = reinterpret_cast<const uint32_t*>(panel);
  if (grad && R <= kPairRanks) pair_rows(left, rows, ldl, R, pairs);
#ifdef FP_TILES
  const Tiles tiles(full_tiles());
  RankRows ranked;
  if (grad && R <= kPairRanks) ranked.fill(pairs, kPairRanks, (rows + 1) / 2, R);
#endif
  for (int64_t k0 = 0; k0 < width; k0 += kCols) {
    const int64_t n = smaller(kCols, width - k0);
    const uint16_t* in = static_cast<const uint16_t*>(x.data) + m0 * x.stride + k0;
    int64_t ldx = x.stride;
    // The distance to what is read next: the next block of these rows, or the first block of the rows after them.
    const int64_t ahead = kAsksAhead ? (k0 + kCols < width ? kCols : m1 < x.count ? rows * ldx - k0 : 0) : 0;
    int64_t s_ahead = ahead;
    [[maybe_unused]] int64_t grad_ahead = s ? 0 : ahead;  // for vectors; tiles prefetch nothing
    if (mask.data || n % 32) {
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t c = 0; c < n; c += 32) {
          if (ahead) __builtin_prefetch(in + m * ldx + c + ahead, 0, 2);
          _mm512_store_si512(copy + m * kPairLead + c,
                             _mm512_maskz_loadu_epi16(kept(mask.row(m, k0), c) & first_of_32(n - c), in + m * ldx + c));
        }
      in = copy;
      ldx = kPairLead;
      s_ahead = grad_ahead = 0;
    }
    if (s && fold) {
      pair_reduce<1, true>(in, ldx, s_ahead, rows, (n + 3) / 4, down + k0 / 4 * ldp, ldp, s, lds);
    } else if (s) {
      const uint32_t* part = down + k0 / 2 * ldp;
      int64_t m = 0, r = 0;
#ifdef FP_TILES
      if (width >= 2 * kTilePairs)
        m = tile_reduce(in, ldx, rows, (n + 2 * kTilePairs - 1) / (2 * kTilePairs), part, ldp, s, lds);
#endif
      in += m * ldx;
      for (; r + 2 * kLanes <= lds && m < rows; r += 2 * kLanes)
        pair_reduce<2, false>(in, ldx, s_ahead, rows - m, (n + 1) / 2, part + r, ldp, s + m * lds + r, lds);
      if (r < lds) pair_reduce<1, false>(in, ldx, s_ahead, rows - m, (n + 1) / 2, part + r, ldp, s + m * lds + r, lds);
      in -= m * ldx;
    }
    for (int64_t r = 0; grad && r < R; r += kPairRanks) {
      const int64_t ranks = smaller(kPairRanks, R - r);
      if (R > kPairRanks) pair_rows(left + r, rows, ldl, ranks, pairs);
#ifdef FP_TILES
      if (R > kPairRanks) ranked.fill(pairs, kPairRanks, (rows + 1) / 2, ranks);
      tile_grads(ranked, ranks, in, ldx, rows, n, grad + r * ldg + k0, ldg);
#else
      pair_grads(pairs, kPairRanks, ranks, in, ldx, grad_ahead, rows, n, grad + r * ldg + k0, ldg);
#endif
    }
    if (sums) pair_grads(kOnes, 0, 1, in, ldx, 0, rows, n, sums + k0, 0);
  }
  if (!s || (!fold && scale == 1.0f)) return;
  for (int64_t m = 0; m < rows; ++m, s += lds) {
    vf v = load<vf>(s);
    if (!fold) {
      for (int64_t r = 0; r < lds; r += kLanes) store(s + r, scale * load<vf>(s + r));
      continue;
    }
    for (int64_t r = 0; r < R; ++r) s[r] = scale * (v[2 * r] + v[2 * r + 1]);
    for (int64_t r = R; r < lds; ++r) s[r] = 0.0f;
  }
}

}  // namespace
