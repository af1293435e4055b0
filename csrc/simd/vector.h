// Vectors of the instruction set FP_ISA (0 plain, 1 AVX2, 2 AVX-512, 3 with BF16; isa.h).
//
// Arithmetic uses GCC's and clang's vector extension, so that kernels are written once; intrinsics only express what it
// cannot. Include after the target pragma, outside of any namespace.
#pragma once
#include <cstdint>
#include <cstring>
#if FP_ISA > 0
#include <immintrin.h>
#endif
#include "simd/kernels.h"

namespace {

using namespace fastpeft;

// Not std::min: an instance of a library template that is compiled for this instruction set could be the copy that the
// linker keeps for the whole library.
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

#if FP_ISA >= 2
constexpr int kLanes = 16;
#elif FP_ISA == 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));

constexpr int64_t vectors(int64_t n) { return (n + kLanes - 1) / kLanes; }

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
inline vf splat(float f) { return f - vf{}; }  // x - 0 is x for every x: folds to a broadcast

// Not `= {}`, which GCC compiles to a `rep stos` on the stack.
template <int MR, int NV>
inline void clear(vf (&acc)[MR][NV]) {
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[m][v] = vf{};
}

inline float total(vf v) {
#if FP_ISA >= 2
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

inline void totals(vf a, vf b, float& of_a, float& of_b) {
#if FP_ISA >= 2
  const __m512 x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
  const __m512 both =
      _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));  // of a, b, a, b in every 128 bits
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
  const __m128 fourth = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 sums = _mm_add_ps(fourth, _mm_movehl_ps(fourth, fourth));
  of_a = _mm_cvtss_f32(sums);
  of_b = _mm_cvtss_f32(_mm_movehdup_ps(sums));
#else
  of_a = total(a);
  of_b = total(b);
#endif
}

// The sums of four vectors.
inline void totals(const vf (&v)[4], float* out) {
#if FP_ISA >= 2  // one sum after another would take twice as many shuffles
  __m512d pairs[2];
  for (int i = 0; i < 2; ++i) {
    const __m512 a = reinterpret_cast<__m512>(v[2 * i]), b = reinterpret_cast<__m512>(v[2 * i + 1]);
    pairs[i] = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  }
  const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[1])),
                                        _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[1])));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = total(v[i]);
#endif
}

}  // namespace
