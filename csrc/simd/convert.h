// Loads and stores of fp32, bf16 and fp16 as vectors of fp32, and conversions of rows.
#pragma once
#include "simd/vector.h"

namespace {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t rest = static_cast<uint32_t>(h & 0x7fffu) << 13;
  float f;
  if (rest >= 0x0f800000u) {  // infinity or NaN
    rest |= 0x7f800000u;
    std::memcpy(&f, &rest, 4);
  } else {  // multiplying by 2^112 corrects the exponent, also of denormals
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
    // Round to nearest even. A NaN would round up to infinity, so it is handled apart.
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
  const __mmask16 valid = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (T == Type::f32) return _mm512_maskz_loadu_ps(valid, static_cast<const float*>(base) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(valid, static_cast<const uint16_t*>(base) + i);
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
#if FP_ISA >= 2  // a masked store of 16-bit elements is microcode on Zen 4
  if constexpr (T == Type::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(base) + i, static_cast<__mmask16>((1u << n) - 1),
                          reinterpret_cast<__m512>(v));
    return;
  }
#endif
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  alignas(64) unsigned char part[kLanes * 4];
  store_from_float<T>(part, 0, v);
  std::memcpy(static_cast<char*>(base) + i * size, part, static_cast<size_t>(n * size));
}

template <Type T>
void to_float_as(const void* src, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) store_some<Type::f32>(out, i, load_some<T>(src, i, n - i), n - i);
}

void to_float(const void* src, Type type, int64_t n, float* out) {
  auto as = type == Type::f32    ? to_float_as<Type::f32>
            : type == Type::bf16 ? to_float_as<Type::bf16>
                                 : to_float_as<Type::f16>;
  as(src, n, out);
}

template <Type T>
void from_float_as(const float* src, int64_t n, void* out) {
  for (int64_t i = 0; i < n; i += kLanes) store_some<T>(out, i, load_some<Type::f32>(src, i, n - i), n - i);
}

void from_float(const float* src, int64_t n, void* out, Type type) {
  auto as = type == Type::f32    ? from_float_as<Type::f32>
            : type == Type::bf16 ? from_float_as<Type::bf16>
                                 : from_float_as<Type::f16>;
  as(src, n, out);
}

}  // namespace
