// Vectors of the instruction set that the including file has named by FP_ISA (0 plain, 1 AVX2, 2 AVX-512, 3 with BF16).
//
// The arithmetic is GCC's and clang's vector extension, so that the kernels are written once; intrinsics stand only where
// it has no word: the 32 x 32 -> 64 bit product, and fp16. Include after the target pragma, inside no namespace.
#pragma once
#include <cstdint>
#include <cstring>
#if FP_ISA > 0
#include <immintrin.h>
#endif
#include "cpu_kernels.h"

namespace {

using fastpeft::Type;

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

// Not `= {}`, which GCC makes a `rep stos` on the stack of.
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
  const __m512 both = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));  // of a, b, a, b in every 128 bits
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

// Counters of Philox.
#if FP_ISA >= 2
// Those of even and odd lanes apart, each in the low half of 64 bits, where a product has both its halves; above it is anything.
struct Counter {
  Counter() = default;
  Counter(__m512i even, __m512i odd) : even(even), odd(odd) {}
  explicit Counter(vu u) : even(reinterpret_cast<__m512i>(u)), odd(_mm512_srli_epi64(even, 32)) {}
  explicit Counter(uint32_t u) : even(_mm512_set1_epi32(static_cast<int>(u))), odd(even) {}
  vu value() const { return reinterpret_cast<vu>(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32))); }
  Counter operator^(Counter o) const { return {even ^ o.even, odd ^ o.odd}; }
  static void mul(Counter a, uint32_t m, Counter& hi, Counter& lo) {
    const __m512i k = _mm512_set1_epi32(static_cast<int>(m));
    lo = {_mm512_mul_epu32(a.even, k), _mm512_mul_epu32(a.odd, k)};
    hi = {_mm512_srli_epi64(lo.even, 32), _mm512_srli_epi64(lo.odd, 32)};
  }
  __m512i even, odd;
};
#else
struct Counter {
  vu v;
  Counter() = default;
  explicit Counter(uint32_t u) : v(vu{} + u) {}
  explicit Counter(vu u) : v(u) {}
  vu value() const { return v; }
  Counter operator^(Counter o) const { return Counter(v ^ o.v); }
  static void mul(Counter a, uint32_t m, Counter& hi, Counter& lo) {
#if FP_ISA == 1  // with 16 registers, not apart as above
    const __m256i x = reinterpret_cast<__m256i>(a.v), k = _mm256_set1_epi32(static_cast<int>(m));
    const __m256i even = _mm256_mul_epu32(x, k), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), k);
    lo.v = reinterpret_cast<vu>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
    hi.v = reinterpret_cast<vu>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
#else
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t product = static_cast<uint64_t>(a.v[i]) * m;
      hi.v[i] = static_cast<uint32_t>(product >> 32);
      lo.v[i] = static_cast<uint32_t>(product);
    }
#endif
  }
};
#endif

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t rest = static_cast<uint32_t>(h & 0x7fffu) << 13;
  float f;
  if (rest >= 0x0f800000u) {  // infinity or NaN
    rest |= 0x7f800000u;
    std::memcpy(&f, &rest, 4);
  } else {  // a multiplication by 2^112 mends the exponent, of denormals too
    std::memcpy(&f, &rest, 4);
    f *= 5192296858534827628530496329220096.0f;
  }
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or above
  if (bits < 0x38800000u) {                        // denormal: the addition rounds at bit 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  bits += 0xfffu + (bits >> 13 & 1u);
  return sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}

template <Type T>
inline vf load_as_float(const void* base, int64_t i) {
  if constexpr (T == Type::f32) return load<vf>(static_cast<const float*>(base) + i);
  const uint16_t* p = static_cast<const uint16_t*>(base) + i;
  if constexpr (T == Type::bf16) {
    return reinterpret_cast<vf>(__builtin_convertvector(load<vh>(p), vu) << 16);
  } else {
#if FP_ISA >= 2
    return _mm512_cvtph_ps(load<__m256i>(p));
#elif FP_ISA == 1
    return _mm256_cvtph_ps(load<__m128i>(p));
#else
    vf v;
    for (int j = 0; j < kLanes; ++j) v[j] = half_to_float(p[j]);
    return v;
#endif
  }
}

template <Type T>
inline void store_from_float(void* base, int64_t i, vf v) {
  if constexpr (T == Type::f32) {
    store(static_cast<float*>(base) + i, v);
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(base) + i;
  if constexpr (T == Type::bf16) {
    // Round to nearest even; a NaN would round up to infinity, so it is set apart.
    const vu bits = reinterpret_cast<vu>(v);
    const vu rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const vu nan = reinterpret_cast<vu>(v != v);
    store(p, __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), vh));
  } else {
#if FP_ISA >= 2
    store(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif FP_ISA == 1
    store(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int j = 0; j < kLanes; ++j) p[j] = float_to_half(v[j]);
#endif
  }
}

inline float scalar_to_float(const void* base, Type type, int64_t i) {
  if (type == Type::f32) return static_cast<const float*>(base)[i];
  const uint16_t h = static_cast<const uint16_t*>(base)[i];
  if (type == Type::f16) return half_to_float(h);
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <Type T>
inline vf load_tail(const void* base, int64_t i, int64_t n) {
#if FP_ISA >= 2
  const __mmask16 own = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (T == Type::f32) return _mm512_maskz_loadu_ps(own, static_cast<const float*>(base) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(own, static_cast<const uint16_t*>(base) + i);
  if constexpr (T == Type::f16) return _mm512_cvtph_ps(half);
  return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#else
  alignas(64) float part[kLanes] = {};
  for (int64_t j = 0; j < n; ++j) part[j] = scalar_to_float(base, T, i + j);
  return load<vf>(part);
#endif
}

template <Type T>
inline vf load_some(const void* base, int64_t i, int64_t n) {
  return n >= kLanes ? load_as_float<T>(base, i) : load_tail<T>(base, i, n);
}

template <Type T>
inline void store_some(void* base, int64_t i, vf v, int64_t n) {
  if (n >= kLanes) return store_from_float<T>(base, i, v);
#if FP_ISA >= 2  // not of 16-bit elements, which is microcode on Zen 4
  if constexpr (T == Type::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(base) + i, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
    return;
  }
#endif
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  alignas(64) unsigned char part[kLanes * 4];
  store_from_float<T>(part, 0, v);
  std::memcpy(static_cast<char*>(base) + i * size, part, static_cast<size_t>(n * size));
}

}  // namespace
