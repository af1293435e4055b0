// From values to 4-bit weights.
#pragma once
#include "simd/convert.h"
#include "simd/fourbit/codes.h"

namespace {

// The midpoints between neighbours of the sorted code, and the nibble of every place in that order.
struct Bounds {
  explicit Bounds(FourBit type) : remaps(type != FourBit::nf4) {
    // 0 comes before -0, as in a stable sort.
    static constexpr uint8_t kSorted[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};
    const float* code = code_of(type);
    for (int i = 0; i < 16; ++i) order[i] = remaps ? kSorted[i] : static_cast<uint32_t>(i);
    for (int i = 0; i < 15; ++i) values[i] = (code[order[i]] + code[order[i + 1]]) * 0.5f;
    values[15] = values[14];
  }
  alignas(64) float values[16];
  uint32_t order[16];
  bool remaps;
};

// The number of bounds below v; 15 for a NaN.
inline vu below(const Bounds& bounds, vf v) {
#if FP_ISA >= 2
  const __m512 x = reinterpret_cast<__m512>(v), all = _mm512_load_ps(bounds.values);
  const auto step = [&](__m512i index, int ahead, int by) {
    const __m512 bound = _mm512_permutexvar_ps(_mm512_add_epi32(index, _mm512_set1_epi32(ahead)), all);
    return _mm512_mask_add_epi32(index, _mm512_cmp_ps_mask(x, bound, _CMP_NLE_UQ), index, _mm512_set1_epi32(by));
  };
  return reinterpret_cast<vu>(step(step(step(step(_mm512_setzero_si512(), 7, 8), 3, 4), 1, 2), 0, 1));
#else
  vi count = vi{} + 15;
  for (int i = 0; i < 15; ++i) count += reinterpret_cast<vi>(splat(bounds.values[i]) >= v);
  return reinterpret_cast<vu>(count);
#endif
}

inline uint8_t encode_one(const Bounds& bounds, float v) {
  int index = 15;
  for (int i = 0; i < 15; ++i) index -= bounds.values[i] >= v;
  return static_cast<uint8_t>(bounds.order[index]);
}

// The largest magnitude in whole vectors; that of a NaN is above all others.
template <Type T>
inline float max_magnitude(const void* w, int64_t i, int64_t n) {
  vi max = vi{};
  for (int64_t j = i; j < i + n; j += kLanes) {
    const vi magnitude = reinterpret_cast<vi>(load_as_float<T>(w, j)) & 0x7fffffff;
    max = magnitude > max ? magnitude : max;
  }
#if FP_ISA >= 2
  const int32_t bits = _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(max));
#else
  int32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits = max[l] > bits ? max[l] : bits;
#endif
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <Type T>
void encode_block(const void* w, int64_t i, int64_t block_size, const Bounds& bounds, const Table& order,
                  uint8_t* packed, float* absmax) {
  *absmax = max_magnitude<T>(w, i, block_size);
  const vf factor = splat(1.0f / (*absmax < kTiny ? kTiny : *absmax));
  for (int64_t j = 0; j < block_size; j += kLanes) {
    const vu place = below(bounds, load_as_float<T>(w, i + j) * factor);
    store_nibbles(packed + ((i + j) >> 1), bounds.remaps ? order.at(place) : place);
  }
}

#if FP_ISA >= 2
// For a code with at most one bound in every cell of 1/16, as NF4: one look-up of a value's cell instead of four
// comparisons.
struct Cells {
  explicit Cells(const Bounds& bounds) : serves(!bounds.remaps) {
    alignas(64) float value[32];
    alignas(64) uint32_t count[32], cell[16];
    _mm512_store_si512(cell, of(_mm512_load_ps(bounds.values)));
    for (uint32_t i = 0; i < 32; ++i) {
      value[i] = __builtin_inff();
      count[i] = 0;
      for (int j = 0; j < 15; ++j) {
        count[i] += cell[j] < i;
        if (cell[j] == i) value[i] = bounds.values[j];
      }
    }
    for (int h = 0; h < 2; ++h) {
      bound[h] = _mm512_load_ps(value + 16 * h);
      before[h] = _mm512_load_si512(count + 16 * h);
    }
  }
  // Monotonic, so that a value in a lower cell than a bound is below it. A NaN is in the last cell.
  static __m512i of(__m512 v) {
    const __m512 place = _mm512_fmadd_ps(v, _mm512_set1_ps(15.99f), _mm512_set1_ps(15.99f));
    return _mm512_maskz_cvttps_epi32(0xffff, _mm512_maskz_min_ps(0xffff, place, _mm512_set1_ps(31.5f)));
  }
  // As `below`.
  __m512i below(__m512 v) const {
    const __m512i cell = of(v), count = _mm512_permutex2var_epi32(before[0], cell, before[1]);
    const __mmask16 past = _mm512_cmp_ps_mask(v, _mm512_permutex2var_ps(bound[0], cell, bound[1]), _CMP_GT_OQ);
    return _mm512_mask_add_epi32(count, past, count, _mm512_set1_epi32(1));
  }
  bool serves;
  __m512 bound[2];
  __m512i before[2];
};

// Values i + 2l and i + 2l + 1 for every lane l.
template <Type T>
inline void load_even_odd(const void* w, int64_t i, __m512& even, __m512& odd) {
  if constexpr (T == Type::bf16) {
    const __m512i both = _mm512_loadu_si512(static_cast<const uint16_t*>(w) + i);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  } else {
    const __m512 a = reinterpret_cast<__m512>(load_as_float<T>(w, i)),
                 b = reinterpret_cast<__m512>(load_as_float<T>(w, i + kLanes));
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = _mm512_permutex2var_ps(a, evens, b);
    odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), b);
  }
}

// At most 16 whole blocks. absmax of all comes first, or every block would wait for its own division.
template <Type T>
void encode_blocks(const void* w, int64_t i, int64_t block_size, int64_t count, const Cells& cells, uint8_t* packed,
                   float* absmax) {
  float factor[16];
  for (int64_t b = 0; b < count; ++b) absmax[b] = max_magnitude<T>(w, i + b * block_size, block_size);
  for (int64_t b = 0; b < count; ++b) factor[b] = 1.0f / (absmax[b] < kTiny ? kTiny : absmax[b]);
  for (int64_t b = 0; b < count; ++b) {
    const __m512 by = _mm512_set1_ps(factor[b]);
    for (int64_t j = i + b * block_size; j < i + (b + 1) * block_size; j += 2 * kLanes) {
      __m512 even, odd;
      load_even_odd<T>(w, j, even, odd);
      const __m512i high = cells.below(_mm512_mul_ps(even, by)), low = cells.below(_mm512_mul_ps(odd, by));
      const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, _mm512_or_si512(_mm512_slli_epi32(high, 4), low));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + (j >> 1)), bytes);
    }
  }
}
#endif

// The rest after the whole blocks, for which bitsandbytes divides, and has a floor for absmax.
template <Type T>
void encode_rest(const void* w, int64_t i, int64_t n, const Bounds& bounds, uint8_t* packed, float* absmax) {
  float max = kTiny;
  for (int64_t j = i; j < n; ++j) {
    const float v = scalar_to_float(w, T, j), magnitude = v < 0 ? -v : v;
    if (!(magnitude <= max)) max = magnitude;
    if (max != max) break;
  }
  *absmax = max;
  for (int64_t j = i; j < n; j += 2) {
    const uint8_t even = encode_one(bounds, scalar_to_float(w, T, j) / max);
    const uint8_t odd = encode_one(bounds, j + 1 < n ? scalar_to_float(w, T, j + 1) / max : 0.0f);
    packed[j >> 1] = static_cast<uint8_t>(even << 4 | odd);
  }
}

template <Type T>
void encode_as(const void* w, int64_t n, FourBit to, int64_t block_size, int64_t first, int64_t last, uint8_t* packed,
               float* absmax) {
  const Bounds bounds(to);
  const Table order(bounds.order);
  int64_t b = first;
#if FP_ISA >= 2
  const Cells cells(bounds);
  const int64_t whole = smaller(last, n / block_size);
  for (; cells.serves && b < whole; b += 16)
    encode_blocks<T>(w, b * block_size, block_size, smaller(16, whole - b), cells, packed, absmax + b);
  b = cells.serves && whole > first ? whole : first;
#endif
  for (; b < last; ++b) {
    const int64_t i = b * block_size;
    if (i + block_size <= n) encode_block<T>(w, i, block_size, bounds, order, packed, absmax + b);
    else encode_rest<T>(w, i, n, bounds, packed, absmax + b);
  }
}

void encode(const void* w, Type type, int64_t n, FourBit to, int64_t block_size, int64_t first, int64_t last,
            uint8_t* packed, float* absmax) {
  auto as = type == Type::f32    ? encode_as<Type::f32>
            : type == Type::bf16 ? encode_as<Type::bf16>
                                 : encode_as<Type::f16>;
  as(w, n, to, block_size, first, last, packed, absmax);
}

}  // namespace
