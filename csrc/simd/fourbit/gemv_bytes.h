// x wᵀ of one to four bf16 rows with a 4-bit weight as it is stored, in products of bytes (AVX-512 VBMI and VNNI).
//
// With so few rows, decoding takes most of the time. Here a permutation looks up 64 nibbles at a time and ignores the
// bits above them, and a product sums four bytes. A code and a value of x are integers of two bytes: the code in units
// of its table, x in a power of two for every 64 values. Of the four products of their bytes low times low is left out,
// 2^-15 of the greatest product at most, where rounding x or W to bf16 costs 2^-9. (Rounding to fp16 costs 2^-12, so
// rows of fp16 are not multiplied this way.) A chunk of 128 weights takes 15 vector instructions for one row, 8 cycles
// on two ports, about the rate at which W is read; codes to AMX's tiles take 14 cycles. Each further row takes 10
// instructions more.
#pragma once
#include "simd/convert.h"
#include "simd/fourbit/codes.h"

namespace {

constexpr int64_t kByteRows = 4;      // at most
constexpr int64_t kRun = 64;          // values of x that share a scale
constexpr int64_t kChunksAtOnce = 8;  // their scales fill a vector

// A chunk of x: the bytes that stand against even weights, the high nibbles, and against odd ones.
struct alignas(64) ByteChunk {
  // The initial value of the sum of high products: cancels the 128 that is added to every byte of a code.
  int32_t start[kLanes];
  int8_t high[2][kChunk / 2], low[2][kChunk / 2];
};

// Rows of x in chunks, followed by the scales of their runs.
struct ByteRows {
  ByteRows(void* data, int64_t M, int64_t K)
      : chunks((K + kChunk - 1) / kChunk), M(M), first(static_cast<ByteChunk*>(data)) {
    static_assert(sizeof(ByteChunk) + 2 * sizeof(float) <= kChunk * sizeof(float),
                  "fits where rows are packed in fp32");
  }
  ByteChunk* row(int64_t m) const { return first + m * chunks; }
  float* scales(int64_t m) const { return reinterpret_cast<float*>(first + M * chunks) + m * 2 * chunks; }
  int64_t chunks, M;
  ByteChunk* first;
};

// v = 256 · high + low for v from -127 · 256 to 127 · 256, both bytes from -128 to 127.
inline __m128i low_bytes(__m512i v) { return _mm512_maskz_cvtepi32_epi8(0xffff, v); }
inline __m128i high_bytes(__m512i v) {
  return low_bytes(_mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8));
}

// Of 64 bytes the even ones, then the odd.
constexpr Indices<uint8_t, 64> kEvenOdd([](int i) { return i % 32 * 2 + i / 32; });

inline float power_of_two(int exponent) {  // a normal one
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return power;
}

// One run of x to its half of a chunk. False where integers cannot hold it: not finite, or (but for zeros) below
// 2^-100.
bool pack_run(const void* x, int64_t at, int64_t half, ByteChunk& chunk, float& scale) {
  // The range of exponents, bounded above so that sums of integers times their unit are finite; and the bits of an
  // integer without its sign.
  constexpr int kMinExponent = -100, kMaxExponent = 90, kBits = 14;
  vf v[kRun / kLanes];
  __m512i magnitude = _mm512_setzero_si512();
  for (int i = 0; i < kRun / kLanes; ++i) {
    v[i] = load_as_float<Type::bf16>(x, at + i * kLanes);
    magnitude =
        _mm512_max_epu32(magnitude, _mm512_and_si512(reinterpret_cast<__m512i>(v[i]), _mm512_set1_epi32(0x7fffffff)));
  }
  const uint32_t max = _mm512_reduce_max_epu32(magnitude);
  const int exponent = static_cast<int>(max >> 23) - 127;
  if (exponent > kMaxExponent || (max && exponent < kMinExponent)) return false;
  const float unit = max ? power_of_two(kBits - 1 - exponent) : 0.0f;
  scale = max ? power_of_two(exponent + 1 - kBits + 8) : 0.0f;  // of a sum in 256ths
  alignas(64) int8_t high[kRun], low[kRun];
  for (int i = 0; i < kRun / kLanes; ++i) {
    const __m512i integers = _mm512_cvtps_epi32(reinterpret_cast<__m512>(v[i] * splat(unit)));
    store(high + i * kLanes, high_bytes(integers));
    store(low + i * kLanes, low_bytes(integers));
  }
  const auto split = [half](const int8_t* from, int8_t (&to)[2][kChunk / 2]) {
    const __m512i even_odd = _mm512_permutexvar_epi8(_mm512_load_si512(kEvenOdd.at), _mm512_load_si512(from));
    store(to[0] + half * kRun / 2, _mm512_castsi512_si256(even_odd));
    store(to[1] + half * kRun / 2, _mm512_extracti64x4_epi64(even_odd, 1));
  };
  split(high, chunk.high);
  split(low, chunk.low);
  return true;
}

// sum + Σ codes · bytes, codes without a sign.
inline __m512i dot_bytes(__m512i sum, __m512i even, __m512i odd, const int8_t (&bytes)[2][kChunk / 2]) {
  return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, even, _mm512_load_si512(bytes[0])), odd,
                             _mm512_load_si512(bytes[1]));
}

// False where integers cannot hold x; `data` is then anything.
bool pack_bytes(const Rows& x, int64_t K, void* data) {
  const ByteRows to(data, x.count, K);
  const __m512i zero = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1);
  for (int64_t m = 0; m < x.count; ++m) {
    ByteChunk* const chunks = to.row(m);
    float* const scales = to.scales(m);
    if (K % kChunk) {
      std::memset(static_cast<void*>(chunks + to.chunks - 1), 0, sizeof(ByteChunk));
      scales[2 * to.chunks - 1] = 0.0f;
    }
    for (int64_t run = 0; run < K / kRun; ++run)
      if (!pack_run(x.data, m * x.stride + run * kRun, run % 2, chunks[run / 2], scales[run])) return false;
    for (int64_t i = 0; i < to.chunks; ++i) {
      const vi high = reinterpret_cast<vi>(dot_bytes(zero, ones, ones, chunks[i].high));
      const vi both = high + reinterpret_cast<vi>(dot_bytes(zero, ones, ones, chunks[i].low));
      store(chunks[i].start, -128 * high - (both >> 1));
      // The shift lost halves, counted here for all lanes of a run and given back; of an odd count every other run gets
      // one more.
      const __mmask16 odd = _mm512_test_epi32_mask(reinterpret_cast<__m512i>(both), _mm512_set1_epi32(1));
      chunks[i].start[0] -= __builtin_popcount(odd & 0xffu) / 2;
      chunks[i].start[kLanes / 2] -= (__builtin_popcount(odd >> 8) + 1) / 2;
    }
  }
  return true;
}

// The two bytes of each code, with 128 added so that they have no sign. The table stands four times in a vector, as a
// permutation of bytes reads six bits of its index.
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

// absmax of 16 runs of a row of W.
struct RunScales {
  RunScales(int64_t K, int64_t block_size) : row_blocks(K / block_size) {
    while (kRun << shift < block_size) ++shift;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
  }
  // From `run` on, which is the first of 16 or of 2: such a group starts inside a block only where it ends in it. 0
  // past the row.
  inline __m512 at(const float* row, int64_t run) const {
    const int64_t block = run >> shift, count = smaller(row_blocks - block, ((kLanes - 1) >> shift) + 1);
    const __m512 values = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_of_32(count)), row + block);
    if (!shift) return values;
    return _mm512_permutexvar_ps(_mm512_srl_epi32(_mm512_load_si512(lane), _mm_cvtsi32_si128(shift)), values);
  }

 private:
  int64_t row_blocks;
  int shift = 0;  // of 64 weights to a block
  alignas(64) int lane[kLanes];
};

template <int M>
struct ByteProduct {
  // Bytes between a load and its prefetch: the hardware's prefetcher alone takes 3.7 ns a chunk of 4096 x 4096,
  // this 3.1.
  static constexpr int64_t kAhead = 2048;

  ByteProduct(const void* x, int64_t K, FourBit type, int64_t block_size)
      : x(const_cast<void*>(x), M, K), tables(type), run_scales(K, block_size), runs(K / kRun) {}

  // y[m * ldy] for a row of W, and its absmax.
  void row(const uint8_t* w, const float* absmax, float* y, int64_t ldy) const {
    __m512 sums[M];
    for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; (i + kChunksAtOnce) * kChunk <= runs * kRun; i += kChunksAtOnce) chunks<kChunksAtOnce>(w, absmax, i, sums);
    for (; i < x.chunks; ++i) chunks<1>(w, absmax, i, sums);
    for (int m = 0; m < M; ++m) y[m * ldy] = _mm512_reduce_add_ps(sums[m]) / tables.unit;
  }

 private:
  template <int Count>
  inline void chunks(const uint8_t* w, const float* absmax, int64_t first, __m512 (&sums)[M]) const {
    const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __mmask16 valid = static_cast<__mmask16>(first_of_32(2 * Count));
    const __m512 of_blocks = run_scales.at(absmax, 2 * first);
    __m512 scales[M];
    for (int m = 0; m < M; ++m)
      scales[m] = _mm512_mul_ps(_mm512_maskz_loadu_ps(valid, x.scales(m) + 2 * first), of_blocks);
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) {
      const uint8_t* from = w + (first + i) * (kChunk / 2);
      __builtin_prefetch(from + kAhead);
      const bool half = Count == 1 && runs == 2 * first + 1;
      const __m512i odd = half ? _mm512_maskz_loadu_epi64(0x0f, from) : _mm512_loadu_si512(from),
                    even = _mm512_srli_epi16(odd, 4);
      const __m512i high_even = _mm512_permutexvar_epi8(even, tables.high),
                    high_odd = _mm512_permutexvar_epi8(odd, tables.high);
      const __m512i low_even = _mm512_permutexvar_epi8(even, tables.low),
                    low_odd = _mm512_permutexvar_epi8(odd, tables.low);
      for (int m = 0; m < M; ++m) {
        const ByteChunk& bytes = x.row(m)[first + i];
        __m512i sum = _mm512_slli_epi32(dot_bytes(_mm512_load_si512(bytes.start), high_even, high_odd, bytes.high), 8);
        sum = dot_bytes(dot_bytes(sum, high_even, high_odd, bytes.low), low_even, low_odd, bytes.high);
        const __m512 scale = _mm512_permutexvar_ps(_mm512_add_epi32(halves, _mm512_set1_epi32(2 * i)), scales[m]);
        sums[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[m]);
      }
    }
  }

  ByteRows x;
  ByteTables tables;
  RunScales run_scales;
  int64_t runs;
};

template <int M>
void multiply_bytes_of(const void* x, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1, float* y,
                       int64_t ldy) {
  const ByteProduct<M> product(x, K, w.type, w.block_size);
  for (int64_t n = n0; n < n1; ++n)
    product.row(w.data + n * (K / 2), absmax + (n - n0) * (K / w.block_size), y + n, ldy);
}

void multiply_bytes(const void* x, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1,
                    float* y, int64_t ldy) {
  static constexpr decltype(&multiply_bytes_of<1>) kOfRows[kByteRows] = {multiply_bytes_of<1>, multiply_bytes_of<2>,
                                                                         multiply_bytes_of<3>, multiply_bytes_of<4>};
  kOfRows[M - 1](x, K, w, absmax, n0, n1, y, ldy);
}

}  // namespace
