// expand of cpu_kernels_impl.h on bf16, by AVX-512-BF16: pairs of ranks, and y written, or read and written, once.
#pragma once
#include "cpu_bf16_impl.h"

namespace {

// y[MR rows, at most 32 columns] = mask(bias + scale * s b), or += where ADD.
template <int MR, bool ONE>
inline void pair_expand_tile(const uint32_t* s, int64_t steps, const uint32_t* panel, int64_t ldp, const float* bias,
                             float scale, Bits mask, int64_t m0, int64_t n0, bool add, uint16_t* y, int64_t stride, __mmask32 columns) {
  constexpr int NV = ONE ? 1 : 2;
  vf acc[MR][NV], start[NV] = {};
  clear(acc);
  for (int m = 0; m < MR; ++m) __builtin_prefetch(y + m * stride + 64, 1, 2);
  for (int64_t i = 0; i < steps; ++i) {
    vu row[NV];
    for (int v = 0; v < NV; ++v) row[v] = load<vu>(panel + i * ldp + v * kLanes);
    for (int m = 0; m < MR; ++m) {
      const vu pair = spread(s + i * kPairRows + m);
      for (int v = 0; v < NV; ++v) acc[m][v] = dot(acc[m][v], row[v], pair);
    }
  }
  if (bias)
    for (int v = 0; v < NV; ++v) start[v] = load<vf>(bias + v * kLanes);
#pragma GCC unroll 16  // or the sums would go through the stack, to be indexed
  for (int m = 0; m < MR; ++m) {
    uint16_t* out = y + m * stride;
    vf sum[2] = {scale * acc[m][0] + start[0], vf{}};
    if constexpr (!ONE) sum[1] = scale * acc[m][1] + start[1];
    const uint8_t* bits = mask.row(m0 + m, n0);
    const __mmask32 keep = kept(bits, 0);
    if (add) {
      const __m512i old = _mm512_maskz_loadu_epi16(columns, out);
      sum[0] = widen(_mm512_castsi512_si256(old)) + masked_by(sum[0], static_cast<__mmask16>(keep));
      sum[1] = widen(_mm512_extracti64x4_epi64(old, 1)) + masked_by(sum[1], static_cast<__mmask16>(keep >> 16));
    }
    __m512i rounded = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(sum[1]), reinterpret_cast<__m512>(sum[0])));
    if (bits && !add) rounded = _mm512_maskz_mov_epi16(keep, rounded);
    // A store under a mask of 16-bit elements is microcode on Zen 4.
    if (columns == 0xffffffffu) _mm512_storeu_si512(out, rounded);
    else _mm512_mask_storeu_epi16(out, columns, rounded);
  }
}

template <int MR, bool ONE>
inline void pair_expand_rows(int64_t& m, const uint32_t* s, int64_t rows, int64_t steps, const uint32_t* panel, int64_t ldp,
                             const float* bias, float scale, Bits mask, int64_t m0, int64_t n0, bool add, uint16_t* y, int64_t stride,
                             __mmask32 columns) {
  for (; m + MR <= rows; m += MR)
    pair_expand_tile<MR, ONE>(s + m, steps, panel, ldp, bias, scale, mask, m0 + m, n0, add, y + m * stride, stride, columns);
}

template <bool ONE>
inline void pair_expand(const uint32_t* s, int64_t rows, int64_t steps, const uint32_t* panel, int64_t ldp, const float* bias,
                        float scale, Bits mask, int64_t m0, int64_t n0, bool add, uint16_t* y, int64_t stride, __mmask32 columns) {
  int64_t m = 0;
  pair_expand_rows<kPairRows, ONE>(m, s, rows, steps, panel, ldp, bias, scale, mask, m0, n0, add, y, stride, columns);
  pair_expand_rows<4, ONE>(m, s, rows, steps, panel, ldp, bias, scale, mask, m0, n0, add, y, stride, columns);
  pair_expand_rows<1, ONE>(m, s, rows, steps, panel, ldp, bias, scale, mask, m0, n0, add, y, stride, columns);
}

void expand_pairs(const float* s, int64_t lds, int64_t m0, int64_t m1, int64_t R, const float* panel, int64_t ldp, const float* bias,
                  float scale, Bits mask, bool add, void* y, int64_t stride, int64_t width) {
  alignas(64) uint32_t pairs[kMostPairRank / 2 * kPairRows];  // of ranks, [R / 2, rows]
  const int64_t steps = (R + 1) / 2;
  for (int64_t m = m0; m < m1; m += kPairRows) {
    const int64_t rows = smaller(kPairRows, m1 - m);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t r = 0; r < R; r += kLanes) {
        alignas(32) uint32_t line[kLanes / 2];
        // What stands past R is anything, and the last pair of an odd rank would multiply it: NaN by zero.
        const __mmask16 own = static_cast<__mmask16>(first_of_32(R - r));
        store(line, reinterpret_cast<vh>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(own, s + (m - m0 + i) * lds + r))));
        for (int64_t j = 0; j < smaller(kLanes / 2, steps - r / 2); ++j) pairs[(r / 2 + j) * kPairRows + i] = line[j];
      }
    uint16_t* out = static_cast<uint16_t*>(y) + m * stride;
    for (int64_t n = 0; n < width; n += 32) {
      const auto tile = width - n > kLanes ? pair_expand<false> : pair_expand<true>;
      tile(pairs, rows, steps, reinterpret_cast<const uint32_t*>(panel) + n, ldp, bias ? bias + n : nullptr, scale, mask, m - m0, n, add,
           out + n, stride, first_of_32(width - n));
    }
  }
}

}  // namespace
