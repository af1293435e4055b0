// bf16 by AVX-512: products of pairs of neighbours, one 32-bit lane each, and masks of elements.
#pragma once
#include "simd/vector.h"

namespace {

inline vf dot(vf sum, vu a, vu b) {
  return reinterpret_cast<vf>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}

inline vu broadcast_pair(const void* p) {  // to all lanes
  uint32_t pair;
  std::memcpy(&pair, p, 4);
  return vu{} + pair;
}
inline vu broadcast_two_pairs(const void* p) {  // to even and odd lanes
  int64_t pairs;
  std::memcpy(&pairs, p, 8);
  return reinterpret_cast<vu>(_mm512_set1_epi64(pairs));
}

inline __mmask32 first_of_32(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }
inline __mmask64 first_of_64(int64_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

inline vf masked_by(vf v, __mmask16 keep) {
  return reinterpret_cast<vf>(_mm512_maskz_mov_ps(keep, reinterpret_cast<__m512>(v)));
}

inline vf widen(__m256i half) { return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }
inline vu low_halves(vf v) {  // bf16 of every lane, in its low half
  return reinterpret_cast<vu>(
      _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)))));
}

}  // namespace
