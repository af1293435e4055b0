// 16 vectors of 16 lanes, transposed in registers; for AVX-512.
#pragma once
#include "simd/vector.h"

namespace {

// For every 128 bits, the first (second) 64 bits of two vectors.
inline __m512 low_halves_of(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
inline __m512 high_halves_of(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

// out[i] = the i-th 128 bits of four vectors.
inline void transpose_quarters(__m512 a, __m512 b, __m512 c, __m512 d, __m512& out0, __m512& out1, __m512& out2,
                               __m512& out3) {
  const __m512 even = _mm512_shuffle_f32x4(a, b, 0x88), odd = _mm512_shuffle_f32x4(a, b, 0xdd);
  const __m512 even2 = _mm512_shuffle_f32x4(c, d, 0x88), odd2 = _mm512_shuffle_f32x4(c, d, 0xdd);
  out0 = _mm512_shuffle_f32x4(even, even2, 0x88);
  out1 = _mm512_shuffle_f32x4(odd, odd2, 0x88);
  out2 = _mm512_shuffle_f32x4(even, even2, 0xdd);
  out3 = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
}

// Inlined, or the 16 vectors would go through memory.
__attribute__((always_inline)) inline void transpose(__m512 (&v)[16]) {
  __m512 a[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {  // now 128 bits of v[i + c] are 4 rows of a column that is c mod 4
    v[i] = low_halves_of(a[i], a[i + 2]);
    v[i + 1] = high_halves_of(a[i], a[i + 2]);
    v[i + 2] = low_halves_of(a[i + 1], a[i + 3]);
    v[i + 3] = high_halves_of(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c)
    transpose_quarters(v[c], v[4 + c], v[8 + c], v[12 + c], v[c], v[4 + c], v[8 + c], v[12 + c]);
}

}  // namespace
