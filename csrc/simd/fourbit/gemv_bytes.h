// x wᵀ of one or two rows with a 4-bit weight as it is stored, in products of bytes (AVX-512 VBMI and VNNI).
//
// With so few rows it is decoding that takes the time. Here a permutation looks up 64 nibbles at a time, whatever stands above their
// bits, and a product sums four bytes: a code and a value of x are integers of two bytes, the one in units of its table, the other of
// a power of two for every 64 values. Of the four products of such bytes low by low is left out: 2^-15 of the greatest product at most,
// where rounding x or W to bf16 is 2^-9 (to fp16 it is 2^-12: rows of that type are multiplied otherwise). A line of 128 weights is 15
// vector instructions for one row, 8 cycles on two ports (codes to tiles take 14), about the rate at which W is read.
#pragma once
#include "simd/fourbit/decode.h"

namespace {

constexpr int64_t kRun = 64, kLine = 2 * kRun;  // values of x with one scale, and the weights of a vector of packed bytes
constexpr int64_t kLinesAtOnce = 8;             // whose scales are a vector

// x for a line of W: the bytes that stand against its even weights, the high nibbles, and against the odd ones.
struct alignas(64) ByteLine {
  int32_t start[kLanes];  // of a sum of high products: it takes out, to half a low one, the 128 that is added to every byte of a code
  int8_t high[2][kLine / 2], low[2][kLine / 2];
};

// Rows of x as lines, and the scales of their runs, in one room.
struct ByteRows {
  ByteRows(void* room, int64_t M, int64_t K) : lines((K + kLine - 1) / kLine), M(M), first(static_cast<ByteLine*>(room)) {}
  int64_t bytes() const { return M * lines * static_cast<int64_t>(sizeof(ByteLine) + 2 * sizeof(float)); }
  ByteLine* row(int64_t m) const { return first + m * lines; }
  float* scales(int64_t m) const { return reinterpret_cast<float*>(first + M * lines) + m * 2 * lines; }
  int64_t lines, M;
  ByteLine* first;
};

int64_t byte_room(int64_t M, int64_t K) { return ByteRows(nullptr, M, K).bytes(); }

// Of v = 256 · high + low in -127 · 256 to 127 · 256, both from -128 to 127.
inline __m128i low_bytes(__m512i v) { return _mm512_maskz_cvtepi32_epi8(0xffff, v); }
inline __m128i high_bytes(__m512i v) { return low_bytes(_mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8)); }

// Of 64 bytes the even ones, then the odd.
constexpr Indices<uint8_t, 64> kEvenOdd([](int i) { return i % 32 * 2 + i / 32; });

inline float power_of_two(int exponent) {  // a normal one
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return power;
}

// A run to its half of a line. False where it is no sum of such integers: not finite, or (but for zeros) below 2^-100.
bool arrange_run(const void* x, int64_t at, int64_t half, ByteLine& line, float& scale) {
  // Exponents, the greatest so that sums of integers times its unit are finite; and the bits of an integer without its sign.
  constexpr int kLeast = -100, kGreatest = 90, kBits = 14;
  vf v[kRun / kLanes];
  __m512i greatest = _mm512_setzero_si512();
  for (int i = 0; i < kRun / kLanes; ++i) {
    v[i] = load_as_float<Type::bf16>(x, at + i * kLanes);
    greatest = _mm512_max_epu32(greatest, _mm512_and_si512(reinterpret_cast<__m512i>(v[i]), _mm512_set1_epi32(0x7fffffff)));
  }
  const uint32_t most = _mm512_reduce_max_epu32(greatest);
  const int exponent = static_cast<int>(most >> 23) - 127;
  if (exponent > kGreatest || (most && exponent < kLeast)) return false;
  const float unit = most ? power_of_two(kBits - 1 - exponent) : 0.0f;
  scale = most ? power_of_two(exponent + 1 - kBits + 8) : 0.0f;  // of a sum in 256ths
  alignas(64) int8_t high[kRun], low[kRun];
  for (int i = 0; i < kRun / kLanes; ++i) {
    const __m512i integers = _mm512_cvtps_epi32(reinterpret_cast<__m512>(v[i] * splat(unit)));
    store(high + i * kLanes, high_bytes(integers));
    store(low + i * kLanes, low_bytes(integers));
  }
  const auto put = [half](const int8_t* from, int8_t (&to)[2][kLine / 2]) {
    const __m512i apart = _mm512_permutexvar_epi8(_mm512_load_si512(kEvenOdd.at), _mm512_load_si512(from));
    store(to[0] + half * kRun / 2, _mm512_castsi512_si256(apart));
    store(to[1] + half * kRun / 2, _mm512_extracti64x4_epi64(apart, 1));
  };
  put(high, line.high);
  put(low, line.low);
  return true;
}

// sum + Σ codes · bytes, codes without a sign.
inline __m512i dot_bytes(__m512i sum, __m512i even, __m512i odd, const int8_t (&bytes)[2][kLine / 2]) {
  return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, even, _mm512_load_si512(bytes[0])), odd, _mm512_load_si512(bytes[1]));
}

bool arrange_bytes(const Rows& x, int64_t K, void* room) {
  const ByteRows to(room, x.count, K);
  const __m512i zero = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1);
  for (int64_t m = 0; m < x.count; ++m) {
    ByteLine* const lines = to.row(m);
    float* const scales = to.scales(m);
    if (K % kLine) {
      std::memset(static_cast<void*>(lines + to.lines - 1), 0, sizeof(ByteLine));
      scales[2 * to.lines - 1] = 0.0f;
    }
    for (int64_t run = 0; run < K / kRun; ++run)
      if (!arrange_run(x.data, m * x.stride + run * kRun, run % 2, lines[run / 2], scales[run])) return false;
    for (int64_t i = 0; i < to.lines; ++i) {
      const vi high = reinterpret_cast<vi>(dot_bytes(zero, ones, ones, lines[i].high));
      const vi both = high + reinterpret_cast<vi>(dot_bytes(zero, ones, ones, lines[i].low));
      store(lines[i].start, -128 * high - (both >> 1));
      // The halves that were lost, for all lanes of a run; where half of one is left, every other run takes it.
      const __mmask16 odd = _mm512_test_epi32_mask(reinterpret_cast<__m512i>(both), _mm512_set1_epi32(1));
      lines[i].start[0] -= __builtin_popcount(odd & 0xffu) / 2;
      lines[i].start[kLanes / 2] -= (__builtin_popcount(odd >> 8) + 1) / 2;
    }
  }
  return true;
}

// The two bytes of each code, without a sign: 128 is added. Four times, as a permutation of bytes looks at six bits of its index.
struct ByteTables {
  explicit ByteTables(FourBit type) : unit(type == FourBit::nf4 ? 127 * 256.0f : 169 * 192.0f) {  // FP4's are 192ths
    const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(code_of(type)), _mm512_set1_ps(unit)));
    const __m512i offset = _mm512_set1_epi8(-128);
    high = _mm512_xor_si512(_mm512_maskz_broadcast_i32x4(0xffff, high_bytes(integers)), offset);
    low = _mm512_xor_si512(_mm512_maskz_broadcast_i32x4(0xffff, low_bytes(integers)), offset);
  }
  float unit;  // of 1
  __m512i high, low;
};

// absmax of 16 runs of a row of W. Decoded where it is used: a gather takes the ports of loads, a product those of vectors.
struct AbsmaxOfRuns {
  AbsmaxOfRuns(const Packed& w, int64_t K) : of(w.absmax), row_blocks(K / w.block_size) {
    while (kRun << shift < w.block_size) ++shift;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
  }

  // From a run of row n on, one of two or the first of 16: such a group starts inside a block only where it ends in it. 0 behind the row.
  inline __m512 at(int64_t n, int64_t run) const {
    if (!shift && run + kLanes <= row_blocks) {  // constants
      const int64_t first = n * row_blocks + run;
      return of.plain ? _mm512_loadu_ps(of.plain + first) : nested(0xffff, first, kLanes);
    }
    const int64_t block = run >> shift, first = n * row_blocks + block;
    const int64_t count = smaller(row_blocks - block, ((kLanes - 1) >> shift) + 1);
    const __mmask16 own = static_cast<__mmask16>(first_of_32(count));
    const __m512 values = of.plain ? _mm512_maskz_loadu_ps(own, of.plain + first) : nested(own, first, count);
    if (!shift) return values;
    return _mm512_permutexvar_ps(_mm512_srl_epi32(_mm512_load_si512(lane), _mm_cvtsi32_si128(shift)), values);
  }

 private:
  inline __m512 nested(__mmask16 own, int64_t first, int64_t count) const {
    if (first / kNestedBlock != (first + count - 1) / kNestedBlock) {
      alignas(64) float values[kLanes];
      absmax(of, first, first + count, values);
      return _mm512_maskz_load_ps(own, values);
    }
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(own, of.codes + first));
    const __m512 values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), own, codes, of.code, 4);
    const vf product = rounded(reinterpret_cast<vf>(values) * splat(of.scale[first / kNestedBlock]));
    return _mm512_maskz_mov_ps(own, reinterpret_cast<__m512>(product + splat(of.offset)));
  }

  const Absmax& of;
  int64_t row_blocks;
  int shift = 0;  // of 64 weights to a block
  alignas(64) int lane[kLanes];
};

template <int M>
struct ByteProduct {
  // Bytes that are asked for ahead: the hardware's prefetcher alone takes 3.7 ns a line of 4096 x 4096, this 3.1.
  static constexpr int64_t kAhead = 2048;

  ByteProduct(const void* x, int64_t K, const Packed& w)
      : x(const_cast<void*>(x), M, K), w(w.data), tables(w.type), absmax(w, K), runs(K / kRun) {}

  // y[m, n] at y[m * ldy].
  void row(int64_t n, float* y, int64_t ldy) const {
    __m512 sums[M];
    for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; (i + kLinesAtOnce) * kLine <= runs * kRun; i += kLinesAtOnce) lines<kLinesAtOnce>(n, i, sums);
    for (; i < x.lines; ++i) lines<1>(n, i, sums);
    for (int m = 0; m < M; ++m) y[m * ldy] = _mm512_reduce_add_ps(sums[m]) / tables.unit;
  }

 private:
  template <int Count>
  inline void lines(int64_t n, int64_t first, __m512 (&sums)[M]) const {
    const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __mmask16 own = static_cast<__mmask16>(first_of_32(2 * Count));
    const __m512 of_blocks = absmax.at(n, 2 * first);
    const uint8_t* from = w + n * (runs * kRun / 2) + first * (kLine / 2);
    __m512 scales[M];
    for (int m = 0; m < M; ++m) scales[m] = _mm512_mul_ps(_mm512_maskz_loadu_ps(own, x.scales(m) + 2 * first), of_blocks);
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) {
      const uint8_t* line = from + i * (kLine / 2);
      __builtin_prefetch(line + kAhead);
      const bool half = Count == 1 && runs == 2 * first + 1;
      const __m512i odd = half ? _mm512_maskz_loadu_epi64(0x0f, line) : _mm512_loadu_si512(line), even = _mm512_srli_epi16(odd, 4);
      const __m512i high_even = _mm512_permutexvar_epi8(even, tables.high), high_odd = _mm512_permutexvar_epi8(odd, tables.high);
      const __m512i low_even = _mm512_permutexvar_epi8(even, tables.low), low_odd = _mm512_permutexvar_epi8(odd, tables.low);
      for (int m = 0; m < M; ++m) {
        const ByteLine& bytes = x.row(m)[first + i];
        __m512i sum = _mm512_slli_epi32(dot_bytes(_mm512_load_si512(bytes.start), high_even, high_odd, bytes.high), 8);
        sum = dot_bytes(dot_bytes(sum, high_even, high_odd, bytes.low), low_even, low_odd, bytes.high);
        const __m512 scale = _mm512_permutexvar_ps(_mm512_add_epi32(halves, _mm512_set1_epi32(2 * i)), scales[m]);
        sums[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[m]);
      }
    }
  }

  ByteRows x;
  const uint8_t* w;
  ByteTables tables;
  AbsmaxOfRuns absmax;
  int64_t runs;
};

template <int M>
void product_bytes_of(const void* x, int64_t K, const Packed& w, int64_t n0, int64_t n1, float* y, int64_t ldy) {
  const ByteProduct<M> product(x, K, w);
  for (int64_t n = n0; n < n1; ++n) product.row(n, y + n, ldy);
}

void product_bytes(const void* x, int64_t M, int64_t K, const Packed& w, int64_t n0, int64_t n1, float* y, int64_t ldy) {
  (M == 1 ? product_bytes_of<1> : product_bytes_of<2>)(x, K, w, n0, n1, y, ldy);
}

}  // namespace
