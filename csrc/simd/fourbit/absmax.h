// absmax of blocks, which may be quantised itself.
#pragma once
#include "simd/fourbit/codes.h"
#if FP_ISA >= 3
#include "simd/transpose.h"
#endif

namespace {

// Keeps the compiler from contracting a product and a sum to an fma, which is rounded once instead of twice.
template <class V>
inline V rounded(V v) {
#if FP_ISA >= 2
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

#if FP_ISA >= 3
// Byte 0 of 16 entries, then their byte 1, and so on.
constexpr Indices<uint8_t, 64> kFourths([](int i) { return i % 16 * 4 + i / 16; });

// A table of 256 fp32 as four tables of bytes: permutations look up 64 indices at a time.
struct ByteTable {
  explicit ByteTable(const float* table) {
    for (int i = 0; i < 4; ++i) {  // 64 entries at a time
      __m512 v[4];
      for (int j = 0; j < 4; ++j) {
        const __m512i entries = _mm512_loadu_si512(table + 64 * i + kLanes * j);
        v[j] = _mm512_castsi512_ps(_mm512_permutexvar_epi8(_mm512_load_si512(kFourths.at), entries));
      }
      transpose_quarters(v[0], v[1], v[2], v[3], v[0], v[1], v[2], v[3]);
      for (int j = 0; j < 4; ++j) bytes[j][i] = _mm512_castps_si512(v[j]);
    }
  }

  // Looks up 64 indices; the values are in their order.
  void at(__m512i index, __m512 (&out)[4]) const {
    // Unpacking reads four bytes of every 128 bits, so the four bytes that go to one vector are put first.
    const __m512i fours = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    index = _mm512_permutexvar_epi32(fours, index);
    const __mmask64 upper = _mm512_movepi8_mask(index);
    __m512i v[4];
    for (int j = 0; j < 4; ++j)
      v[j] = _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(bytes[j][0], index, bytes[j][1]), upper,
                                  _mm512_permutex2var_epi8(bytes[j][2], index, bytes[j][3]));
    const __m512i low01 = _mm512_unpacklo_epi8(v[0], v[1]), high01 = _mm512_unpackhi_epi8(v[0], v[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(v[2], v[3]), high23 = _mm512_unpackhi_epi8(v[2], v[3]);
    out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
    out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
    out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
    out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
  }

 private:
  __m512i bytes[4][4];
};

struct NestedAbsmax {  // `decode`: absmax of blocks [i, end), which share a scale, to `out`; returns the end of `out`
  explicit NestedAbsmax(const Absmax& of) : of(of), table(of.code) {}

  float* decode(int64_t i, int64_t end, float* out) const {
    const vf scale = splat(of.scale[i / kNestedBlock]);
    for (; i + 64 <= end; i += 64, out += 64) decode_some_blocks(i, 64, scale, out);
    if (i < end) decode_some_blocks(i, end - i, scale, out);
    return out + (end - i);
  }

 private:
  inline void decode_some_blocks(int64_t i, int64_t count, vf scale, float* out) const {
    __m512 v[4];
    table.at(_mm512_maskz_loadu_epi8(first_of_64(count), of.codes + i), v);
    for (int j = 0; j < 4; ++j) {
      const vf value = rounded(reinterpret_cast<vf>(v[j]) * scale) + splat(of.offset);
      _mm512_mask_storeu_ps(out + kLanes * j, static_cast<__mmask16>(first_of_64(count) >> kLanes * j),
                            reinterpret_cast<__m512>(value));
    }
  }

  const Absmax& of;
  const ByteTable table;
};
#else
struct NestedAbsmax {
  explicit NestedAbsmax(const Absmax& of) : of(of) {}
  float* decode(int64_t i, int64_t end, float* out) const {
    const float scale = of.scale[i / kNestedBlock];
    alignas(64) float table[256];
    for (int c = 0; c < 256; c += kLanes) store(table + c, rounded(load<vf>(of.code + c) * scale) + of.offset);
    for (; i < end; ++i) *out++ = table[of.codes[i]];
    return out;
  }
  const Absmax& of;
};
#endif

void absmax(const Absmax& of, int64_t first, int64_t last, float* out) {
  constexpr int64_t kTableBlocks = 64;  // for fewer blocks no table is made
  if (of.plain) {
    std::memcpy(out, of.plain + first, static_cast<size_t>(last - first) * sizeof(float));
    return;
  }
  if (last - first < kTableBlocks) {
    for (int64_t i = first; i < last; ++i)
      *out++ = rounded(of.code[of.codes[i]] * of.scale[i / kNestedBlock]) + of.offset;
    return;
  }
  const NestedAbsmax nested(of);
  for (int64_t i = first; i < last;) {
    const int64_t end = smaller(last, (i / kNestedBlock + 1) * kNestedBlock);
    out = nested.decode(i, end, out);
    i = end;
  }
}

}  // namespace
