// The code tables of 16 entries in registers, looked up by nibbles.
#pragma once
#include "simd/fourbit_kernels.h"
#include "simd/vector.h"
#if FP_ISA >= 3
#include "simd/bf16.h"
#endif

namespace {

// Constant indices of a permutation: f(i) in place i.
template <class T, int N>
struct Indices {
  template <class F>
  constexpr explicit Indices(F f) : at() {
    for (int i = 0; i < N; ++i) at[i] = static_cast<T>(f(i));
  }
  alignas(64) T at[N];
};

// kLanes bytes, one for every lane. By intrinsics, as GCC 12 compiles __builtin_convertvector of bytes to scalar code.
inline vu widen_bytes(const uint8_t* p) {
#if FP_ISA >= 2
  return reinterpret_cast<vu>(_mm512_cvtepu8_epi32(load<__m128i>(p)));
#elif FP_ISA == 1
  return reinterpret_cast<vu>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return vu{p[0], p[1], p[2], p[3]};
#endif
}

// kLanes nibbles to kLanes / 2 bytes, the first of two in the high half.
inline void store_nibbles(uint8_t* out, vu nibbles) {
#if FP_ISA >= 2
  const __m512i pairs = reinterpret_cast<__m512i>(nibbles);
  const __m128i bytes =
      _mm512_cvtepi64_epi8(_mm512_or_si512(_mm512_slli_epi64(pairs, 4), _mm512_srli_epi64(pairs, 32)));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), bytes);
#else
  for (int i = 0; i < kLanes; i += 2) out[i / 2] = static_cast<uint8_t>(nibbles[i] << 4 | nibbles[i + 1]);
#endif
}

alignas(64) constexpr float kNf4[16] = {FP_NF4_CODE};
alignas(64) constexpr float kFp4[16] = {FP_FP4_CODE};
constexpr float kTiny = 1e-38f;

inline const float* code_of(FourBit type) { return type == FourBit::nf4 ? kNf4 : kFp4; }

#if FP_ISA >= 3
// The codes in bf16, for products whose sums are multiplied by absmax. They are multiplied by `unit` first. Without it
// the rounding errors of NF4's codes have a mean of 2e-4 over normally distributed weights, which adds up over x of one
// sign; with it the mean is below 4e-6 in blocks of any size. FP4's codes, 192ths of at most eight bits, become exact.
struct PairCodes {
  explicit PairCodes(FourBit type) : unit(type == FourBit::nf4 ? 1.28695f : 1.5f) {
    const __m512 codes = _mm512_mul_ps(_mm512_load_ps(code_of(type)), _mm512_set1_ps(unit));
    table = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(codes, codes));  // twice, as bit 4 of an index belongs to another nibble
  }
  float unit;
  __m512i table;
};
#endif

// 16 entries of 32 bits in registers.
struct Table {
  explicit Table(const void* entries) {
#if FP_ISA >= 2
    all = _mm512_loadu_si512(entries);
#elif FP_ISA == 1
    low = _mm256_loadu_si256(static_cast<const __m256i*>(entries));
    high = _mm256_loadu_si256(static_cast<const __m256i*>(entries) + 1);
#else
    std::memcpy(all, entries, sizeof(all));
#endif
  }
  // entry[index % 16] for every lane.
  vu at(vu index) const {
#if FP_ISA >= 2
    return reinterpret_cast<vu>(_mm512_permutexvar_epi32(reinterpret_cast<__m512i>(index), all));
#elif FP_ISA == 1
    const __m256i i = reinterpret_cast<__m256i>(index);
    const __m256 first = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(low, i));
    const __m256 second = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(high, i));
    return reinterpret_cast<vu>(_mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28))));
#else
    vu out;
    for (int i = 0; i < kLanes; ++i) out[i] = all[index[i] & 15];
    return out;
#endif
  }
  vf values(vu index) const { return reinterpret_cast<vf>(at(index)); }
#if FP_ISA >= 2
  __m512i all;
#elif FP_ISA == 1
  __m256i low, high;
#else
  uint32_t all[16];
#endif
};

}  // namespace
