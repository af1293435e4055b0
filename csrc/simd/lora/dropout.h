// Keep masks of dropout as bits: drawn, and applied to vectors.
#pragma once
#include "shared/dropout.h"
#include "simd/convert.h"

namespace {

// Counters of Philox.
#if FP_ISA >= 2
// Counters of even and odd lanes are kept apart, in the low halves of 64 bits, as a product yields both its halves
// there. The upper halves may hold anything.
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
#if FP_ISA == 1  // 16 registers are too few to keep them apart
    const __m256i x = reinterpret_cast<__m256i>(a.v), k = _mm256_set1_epi32(static_cast<int>(m));
    const __m256i even = _mm256_mul_epu32(x, k), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), k);
    lo.v = reinterpret_cast<vu>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
    hi.v = reinterpret_cast<vu>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
#else
    vu high{}, low{};
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t product = static_cast<uint64_t>(a.v[i]) * m;
      high[i] = static_cast<uint32_t>(product >> 32);
      low[i] = static_cast<uint32_t>(product);
    }
    hi.v = high;
    lo.v = low;
#endif
  }
};
#endif

// Two vectors of counters at a time: a single chain of seven rounds would wait for the latency of its products.
constexpr int kChains = 2;

// Which of kLanes adjacent calls a lane draws: store_bits leaves the lanes in this order.
constexpr int call_of(int lane) {
#if FP_ISA >= 2
  return lane % 4 * 4 + lane / 4;
#elif FP_ISA == 1
  return lane % 4 / 2 * 4 + lane / 4 * 2 + lane % 2;
#else
  return lane;
#endif
}

#if FP_ISA >= 2
// A function, as a lambda's conversion to a function pointer would be compiled without the target.
inline __m512i pair(__m512i low, __m512i high) {
  return _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64(high, 32));
}
#endif

// Stores the keep bits of kLanes calls, a byte of eight columns each, in the order of the calls. The words of a call
// are put side by side, so that one comparison of 16-bit integers makes whole bytes.
inline void store_bits(uint8_t* out, const Counter (&word)[4], KeepRule rule) {
#if FP_ISA >= 2
  const __m512i even[2] = {pair(word[0].even, word[1].even), pair(word[2].even, word[3].even)};
  const __m512i odd[2] = {pair(word[0].odd, word[1].odd), pair(word[2].odd, word[3].odd)};
  const __m512i calls[4] = {_mm512_unpacklo_epi64(even[0], even[1]), _mm512_unpacklo_epi64(odd[0], odd[1]),
                            _mm512_unpackhi_epi64(even[0], even[1]), _mm512_unpackhi_epi64(odd[0], odd[1])};
  const __m512i draw = _mm512_set1_epi16(kDrawBits), most = _mm512_set1_epi16(rule.most);
  for (int k = 0; k < 4; ++k) {
    const uint32_t bits = _mm512_cmpgt_epi16_mask(_mm512_and_si512(calls[k], draw), most) ^ rule.flip;
    std::memcpy(out + 4 * k, &bits, 4);
  }
#elif FP_ISA == 1
  const auto words = [&](int j) { return reinterpret_cast<__m256i>(word[j].value()); };
  const __m256i draw = _mm256_set1_epi16(kDrawBits), most = _mm256_set1_epi16(rule.most);
  const auto kept = [&](__m256i low, __m256i high) {
    const auto above = [&](__m256i calls) { return _mm256_cmpgt_epi16(_mm256_and_si256(calls, draw), most); };
    const __m256i bytes =
        _mm256_packs_epi16(above(_mm256_unpacklo_epi64(low, high)), above(_mm256_unpackhi_epi64(low, high)));
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes)) ^ rule.flip;
  };
  const uint32_t bits[2] = {kept(_mm256_unpacklo_epi32(words(0), words(1)), _mm256_unpacklo_epi32(words(2), words(3))),
                            kept(_mm256_unpackhi_epi32(words(0), words(1)), _mm256_unpackhi_epi32(words(2), words(3)))};
  std::memcpy(out, bits, 8);
#else
  vu bits{};
  for (int j = 0; j < 8; ++j) {
    const vu value = word[j / 2].value() >> (j % 2 ? 16 : 0) & static_cast<uint32_t>(kDrawBits);
    bits |= reinterpret_cast<vu>(reinterpret_cast<vi>(value) > vi{} + rule.most) & 1u << j;
  }
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<uint8_t>(bits[i] ^ rule.flip);
#endif
}

inline vu load_bits(const uint8_t* bits, int64_t column) {
#if FP_ISA >= 2
  __mmask16 m;
  std::memcpy(&m, bits + column / 8, 2);
  return reinterpret_cast<vu>(_mm512_movm_epi32(m));
#else
  vu select;
  for (int i = 0; i < kLanes; ++i) select[i] = 1u << i;
  const vu byte = vu{} + static_cast<uint32_t>(bits[column / 8] >> column % 8);
  return reinterpret_cast<vu>((byte & select) == select);
#endif
}

// The part of the first three rounds that depends on the columns of kLanes counters alone: only one product involves
// the row.
struct ColumnWords {
  // For row numbers whose upper 32 bits are `high`.
  void of(uint32_t first, uint32_t high, uint32_t k0, uint32_t k1) {
    vu lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(call_of(i));
    Counter c[4] = {Counter(lane + first), Counter(0u), Counter(high), Counter(0u)};
    philox_round(c[0], c[1], c[2], c[3], k0, k1);
    Counter hi, lo;
    two = c[3] ^ Counter(k1 + kPhiloxW1);
    Counter::mul(c[2], kPhiloxM1, hi, lo);
    zero = lo ^ Counter(k0 + 2 * kPhiloxW0);
    Counter::mul(hi ^ c[1] ^ Counter(k0 + kPhiloxW0), kPhiloxM0, hi, lo);
    three = lo;
    after_two = hi ^ Counter(k1 + 2 * kPhiloxW1);
  }
  // The words after these rounds. `product`: kPhiloxM0 times the first word, which depends on the row.
  void meet(uint64_t product, Counter (&word)[4]) const {
    Counter::mul(two ^ Counter(static_cast<uint32_t>(product >> 32)), kPhiloxM1, word[0], word[1]);
    word[0] = word[0] ^ zero;
    word[2] = after_two ^ Counter(static_cast<uint32_t>(product));
    word[3] = three;
  }
  Counter two, zero, after_two, three;
};

void draw(Dropout drop, int64_t m0, int64_t m1, int64_t width, uint8_t* bits, int64_t ld) {
  constexpr int kKnown = 3;  // rounds
  const uint32_t k0 = static_cast<uint32_t>(drop.seed), k1 = static_cast<uint32_t>(drop.seed >> 32);
  constexpr int64_t kCalls = kChains * kLanes;
  static_assert(kCols % (8 * kCalls) == 0);  // no step passes the end of a row of bits
  const KeepRule rule = keep_rule(drop.threshold);
  for (int64_t call = 0; 8 * call < width; call += kCalls) {
    ColumnWords columns[kChains];
    const auto begin = [&](int64_t row) {
      for (int i = 0; i < kChains; ++i)
        columns[i].of(static_cast<uint32_t>(call + i * kLanes), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32),
                      k0, k1);
    };
    begin(m0);
    uint8_t* out = bits + call;
    for (int64_t m = m0; m < m1; ++m, out += ld) {
      const uint64_t row = static_cast<uint64_t>(m);
      const uint32_t high = static_cast<uint32_t>(row >> 32), low = static_cast<uint32_t>(row);
      if (low == 0) begin(m);
      const uint32_t first = static_cast<uint32_t>(static_cast<uint64_t>(high) * kPhiloxM1 >> 32) ^ low ^ k0;
      Counter w[kChains][4];
      for (int i = 0; i < kChains; ++i) columns[i].meet(static_cast<uint64_t>(first) * kPhiloxM0, w[i]);
      uint32_t r0 = k0 + kKnown * kPhiloxW0, r1 = k1 + kKnown * kPhiloxW1;
      for (int round = kKnown; round < kPhiloxRounds; ++round, r0 += kPhiloxW0, r1 += kPhiloxW1)
        for (int i = 0; i < kChains; ++i) philox_round(w[i][0], w[i][1], w[i][2], w[i][3], r0, r1);
      for (int i = 0; i < kChains; ++i) store_bits(out + i * kLanes, w[i], rule);
    }
  }
}

#if FP_ISA >= 2
// The keep bits of 32 columns of a mask's row, from `column` on; all ones without a mask.
inline __mmask32 kept(const uint8_t* bits, int64_t column) {
  __mmask32 word = 0xffffffffu;
  if (bits) std::memcpy(&word, bits + column / 8, 4);
  return word;
}
#endif

inline vf masked(vf x, vu mask) { return reinterpret_cast<vf>(reinterpret_cast<vu>(x) & mask); }

template <Type T>
void drop_as(const Rows& x, int64_t m0, int64_t m1, int64_t width, Bits mask, float scale, bool add, void* out,
             int64_t stride) {
  for (int64_t m = m0; m < m1; ++m)
    for (int64_t column = 0; column < width; column += kLanes) {
      const int64_t n = width - column, to = (m - m0) * stride + column;
      const uint8_t* bits = mask.row(m - m0, 0);
      vf value = scale * load_some<T>(x.data, m * x.stride + column, n);
      if (bits) value = masked(value, load_bits(bits, column));
      if (add) value += load_some<T>(out, to, n);
      store_some<T>(out, to, value, n);
    }
}

void drop(Rows x, int64_t m0, int64_t m1, int64_t width, Bits mask, float scale, bool add, void* out, int64_t stride) {
  auto as = x.type == Type::f32 ? drop_as<Type::f32> : x.type == Type::bf16 ? drop_as<Type::bf16> : drop_as<Type::f16>;
  as(x, m0, m1, width, mask, scale, add, out, stride);
}

}  // namespace
