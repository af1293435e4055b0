// From 4-bit weights to values.
//
// Bound by memory: for every value half a byte is read and two (four) are written. Nibbles are looked up in fp32 and
// the product with absmax is rounded once, so that the bytes equal bitsandbytes'.
#pragma once
#include "simd/convert.h"
#include "simd/fourbit/absmax.h"

namespace {

// From so many bytes on, whole lines are written past the caches: an ordinary store would first read the line.
constexpr int64_t kPastCaches = 4 << 20;

#if FP_ISA >= 2
template <class V>
inline void store_line(void* out, V line, bool past_caches) {
  if (past_caches) _mm512_stream_si512(static_cast<__m512i*>(out), reinterpret_cast<__m512i>(line));
  else store(out, line);
}
#endif

// Interleaves `even` and `odd`.
template <Type T>
inline void store_pairs(void* out, int64_t i, vf even, vf odd, [[maybe_unused]] bool past_caches) {
  if constexpr (T == Type::f32) {
    float* p = static_cast<float*>(out) + i;
#if FP_ISA >= 2
    store_line(p, __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
               past_caches);
    store_line(p + 16, __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31),
               past_caches);
#elif FP_ISA == 1
    store(p, __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11));
    store(p + 8, __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15));
#else
    store(p, __builtin_shufflevector(even, odd, 0, 4, 1, 5));
    store(p + 4, __builtin_shufflevector(even, odd, 2, 6, 3, 7));
#endif
  } else {
    alignas(64) uint16_t half[2 * kLanes];
    store_from_float<T>(half, 0, even);
    store_from_float<T>(half, kLanes, odd);
    const vu low = __builtin_convertvector(load<vh>(half), vu),
             high = __builtin_convertvector(load<vh>(half + kLanes), vu);
    store(static_cast<uint16_t*>(out) + i, low | high << 16);
  }
}

template <Type T>
void decode_one(const uint8_t* packed, const float* code, int64_t i, float scale, void* out, int64_t o) {
  store_some<T>(out, o, splat(code[packed[i >> 1] >> (i & 1 ? 0 : 4) & 15] * scale), 1);
}

#if FP_ISA >= 2
// The 16 values of a block in 16 bits, twice, as a permutation of words reads five bits of its index.
template <Type T>
inline __m512i block_code(vf values) {
  __m256i half;  // `maskz` forms with full masks: GCC 12 warns about the plain ones in its own header, GCC bug 105593
  if constexpr (T == Type::f16) {
    half = _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(values), _MM_FROUND_TO_NEAREST_INT);
  } else {  // vcvtneps2bf16 would flush denormals to zero
    const vu bits = reinterpret_cast<vu>(values), nan = reinterpret_cast<vu>(values != values);
    const vu rounded_up = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    half = _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>((rounded_up & ~nan) | (nan & 0x7fc0u)));
  }
  return _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(half), half, 1);
}
#endif

// Values [begin, end) of one block: `begin` is even, and they fill whole vectors.
template <Type T>
inline void decode_vectors(const uint8_t* packed, const Table& table, int64_t begin, int64_t end, float scale,
                           bool past_caches, void* out) {
  const uint8_t* from = packed + (begin >> 1);
#if FP_ISA >= 2
  if constexpr (T != Type::f32) {
    const __m512i code = block_code<T>(reinterpret_cast<vf>(table.all) * splat(scale));
    for (int64_t i = 0; i < end - begin; i += 2 * kLanes) {
      const vu bytes = widen_bytes(from + (i >> 1)), nibbles = bytes >> 4 | bytes << 16;
      const __m512i line = _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(nibbles), code);
      store_line(static_cast<uint16_t*>(out) + i, line, past_caches);
    }
    return;
  }
#endif
  const vf factor = splat(scale);
  for (int64_t i = 0; i < end - begin; i += 2 * kLanes) {
    const vu bytes = widen_bytes(from + (i >> 1));
    store_pairs<T>(out, i, table.values(bytes >> 4) * factor, table.values(bytes) * factor, past_caches);
  }
}

// Any values [begin, end) of one block.
template <Type T>
__attribute__((noinline)) void decode_some(const uint8_t* packed, const float* code, const Table& table, int64_t begin,
                                           int64_t end, float scale, char* out) {
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  const int64_t even = begin + (begin & 1),
                whole = even + (end > even ? (end - even) / (2 * kLanes) * (2 * kLanes) : 0);
  if (begin < even) decode_one<T>(packed, code, begin, scale, out, 0);
  decode_vectors<T>(packed, table, even, whole, scale, false, out + (even - begin) * size);
  for (int64_t i = whole; i < end; ++i) decode_one<T>(packed, code, i, scale, out, i - begin);
}

template <Type T>
void decode_as(const Packed& w, int64_t begin, int64_t width, int64_t rows, int64_t stride, void* out) {
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  const float* code = code_of(w.type);
  const Table table(code);
  alignas(64) float scales[kNestedBlock];
  char* to = static_cast<char*>(out);
  const bool lines = begin % (2 * kLanes) == 0 && rows == 1 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const bool past_caches = lines && width * size >= kPastCaches;
  for (int64_t m = 0; m < rows; ++m, begin += stride)
    for (int64_t i = begin, end = begin + width; i < end;) {
      const int64_t first = i / w.block_size;
      const int64_t last = smaller((end - 1) / w.block_size + 1, (first / kNestedBlock + 1) * kNestedBlock);
      absmax(w.absmax, first, last, scales);
      int64_t stop = first * w.block_size;
      for (int64_t b = 0; b < last - first; ++b) {
        stop += w.block_size;
        const int64_t to_end = smaller(end, stop);
        if ((i | to_end) % (2 * kLanes) == 0) decode_vectors<T>(w.data, table, i, to_end, scales[b], past_caches, to);
        else decode_some<T>(w.data, code, table, i, to_end, scales[b], to);
        to += (to_end - i) * size;
        i = to_end;
      }
    }
#if FP_ISA >= 2
  if (past_caches) _mm_sfence();
#endif
}

void decode(const Packed& w, int64_t begin, int64_t width, int64_t rows, int64_t stride, void* out, Type type) {
  auto as = type == Type::f32    ? decode_as<Type::f32>
            : type == Type::bf16 ? decode_as<Type::bf16>
                                 : decode_as<Type::f16>;
  as(w, begin, width, rows, stride, out);
}

}  // namespace
