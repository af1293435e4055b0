// A 4-bit weight in bf16 by planes, for the products of many rows: x wᵀ on the tile registers of AMX-BF16, and dy w
// everywhere.
//
// The 64 packed bytes of a chunk are 32 words of 4 nibbles, and so four vectors (planes) of 32 weights, each a shift
// and a permutation of the table of code · absmax, rounded once, as where the weight is dequantised. For x wᵀ a plane
// is a row of a left tile as it is. For dy w the words of two rows of W are interleaved, and a plane holds the pairs of
// 16 columns.
#pragma once
#include "simd/fourbit/gemv_nibbles.h"
#include "simd/transpose.h"

namespace {

constexpr int kPlanes = 4;

// Interleaves the words of two halves.
constexpr Indices<uint16_t, 32> kPairsOfRows([](int i) { return i % 2 * 16 + i / 2; });

// 128 nibbles of 32 words to planes. The words of the mask `second` are multiplied by another absmax: they set bit 4 of
// the index.
struct PlaneDecoder {
  PlaneDecoder(FourBit type, __mmask32 second)
      : code(_mm512_load_ps(code_of(type))), upper(_mm512_mask_set1_epi16(_mm512_setzero_si512(), second, 16)) {}

  void planes(__m512i words, float first, float second, __m512i (&out)[kPlanes]) const {
    const __m512i table = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(_mm512_mul_ps(code, _mm512_set1_ps(second)), _mm512_mul_ps(code, _mm512_set1_ps(first))));
    const __m512i low = _mm512_set1_epi16(15);
    // (word & 15) | upper
    const auto plane = [&](__m512i index) {
      return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(index, low, upper, 0xEA), table);
    };
    out[0] = plane(words);
    out[1] = plane(_mm512_srli_epi16(words, 4));
    out[2] = plane(_mm512_srli_epi16(words, 8));
    out[3] = plane(_mm512_srli_epi16(words, 12));
  }

  __m512 code;
  __m512i upper;
};

// 16 values, or the first `count` of them, to y[at ...].
inline void store_16(__m512 v, void* y, Type type, int64_t at, int64_t count) {
  const __mmask16 valid = static_cast<__mmask16>(first_of_32(count));
  if (type == Type::f32) return _mm512_mask_storeu_ps(static_cast<float*>(y) + at, valid, v);
  const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
  uint16_t* const to = static_cast<uint16_t*>(y) + at;
  if (count >= 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  else _mm256_mask_storeu_epi16(to, valid, half);  // microcode on Zen 4
}

// 64 columns of dx from the sums of the four planes.
inline void store_planes(const float* sums, int64_t stride, void* dx, Type type, int64_t at) {
  __m512 word[kPlanes];  // word[i]: the i-th weights of 16 words of four
  for (int p = 0; p < kPlanes; ++p) word[kPlaceOfPlane[p]] = _mm512_load_ps(sums + p * stride);
  const __m512 a = _mm512_unpacklo_ps(word[0], word[1]), b = _mm512_unpackhi_ps(word[0], word[1]);
  const __m512 c = _mm512_unpacklo_ps(word[2], word[3]), d = _mm512_unpackhi_ps(word[2], word[3]);
  __m512 out[4];
  transpose_quarters(low_halves_of(a, c), high_halves_of(a, c), low_halves_of(b, d), high_halves_of(b, d), out[0],
                     out[1], out[2], out[3]);
  for (int i = 0; i < 4; ++i) store_16(out[i], dx, type, at + 16 * i, 16);
}

// The strip [k0, k1) of W, copied part by part: rows of W lie so far apart that a cache keeps few of their lines, and a
// processor few of their pages.
struct Strip {
  Strip(const Packed& w, const float* absmax, int64_t N, int64_t K, int64_t k0, int64_t k1, float* scratch)
      : N(N),
        parts((k1 - k0) / kStripPart),
        packed(reinterpret_cast<char*>(scratch)),
        scales(scratch + N * kStrip / 8) {
    const int64_t row_blocks = K / w.block_size;
    for (int64_t n = 0; n < N; ++n) {
      const uint8_t* from = w.data + (n * K + k0) / 2;
      for (int64_t i = 0; i < parts; ++i) {
        std::memcpy(packed + (i * N + n) * 32, from + i * 32, 32);
        scales[i * N + n] = absmax[n * row_blocks + (k0 + i * kStripPart) / w.block_size];
      }
    }
  }
  int64_t N, parts;
  char* packed;   // [parts, N, 32 bytes]
  float* scales;  // [parts, N]
};

// One part of a strip, decoded in pairs of rows.
struct StripPart {
  StripPart(const Strip& strip, FourBit type, int64_t part)
      : decoder(type, 0xaaaaaaaau),
        packed(strip.packed + part * strip.N * 32),
        scales(strip.scales + part * strip.N),
        N(strip.N) {}

  // Rows 2 pair and 2 pair + 1 to planes; zero past the last row.
  inline void decode(int64_t pair, __m512i (&planes)[kPlanes]) const {
    const __m512i interleaved = _mm512_load_si512(kPairsOfRows.at);
    const int64_t n = 2 * pair;
    if (n + 1 < N) {
      decoder.planes(_mm512_permutexvar_epi16(interleaved, _mm512_loadu_si512(packed + n * 32)), scales[n],
                     scales[n + 1], planes);
    } else if (n < N) {
      decoder.planes(_mm512_permutexvar_epi16(interleaved, _mm512_maskz_loadu_epi64(0x0f, packed + n * 32)), scales[n],
                     0.0f, planes);
    } else {
      for (int p = 0; p < kPlanes; ++p) planes[p] = _mm512_setzero_si512();
    }
  }

  const PlaneDecoder decoder;
  const char* packed;
  const float* scales;
  int64_t N;
};

}  // namespace
