// The CPU kernels of 4-bit weights, one table for each instruction set; the format: shared/fourbit.h.
#pragma once
#include "shared/fourbit.h"
#include "simd/kernels.h"

namespace fastpeft {

struct Absmax {        // of every block
  const float* plain;  // or null, and then code[codes[i]] * scale[i / kNestedBlock] + offset
  const uint8_t* codes;
  const float* code;  // [256]
  const float* scale;
  float offset;
};

struct Packed {
  const uint8_t* data;
  Absmax absmax;
  FourBit type;
  int64_t block_size;
};

// A chunk is 128 weights, 64 packed bytes. Packed rows of x are padded with zeros to whole chunks.
constexpr int64_t kChunk = 128;
constexpr int64_t whole_chunks(int64_t K) { return (K + kChunk - 1) / kChunk * kChunk; }

// How gemv packs x.
enum class GemvFormat : int { floats, pairs, bytes };

// y = x wᵀ for a few rows of x, with W read as it is stored. K % block_size == 0.
struct FourBitGemv {
  // The number of rows up to which this is the fastest path, measured at K = N = 4096.
  int64_t (*max_rows)(Type x, int64_t block_size);
  // All rows of x to `out`, aligned, of x.count * whole_chunks(K) floats. The format depends on the type and the values
  // of x.
  GemvFormat (*pack)(const Rows& x, int64_t K, int64_t block_size, void* out);
  // y[m, n] = sum_k x[m, k] w[n, k] in fp32 for n in [n0, n1). `absmax`: of the blocks of these rows of W.
  void (*multiply)(GemvFormat format, const void* x, int64_t M, int64_t K, const Packed& w, const float* absmax,
                   int64_t n0, int64_t n1, float* y, int64_t ldy);
};

// Columns of W that one call of `backward` takes at most, and the part of them that it multiplies at a time.
constexpr int64_t kStrip = 256, kStripPart = 64;

// y = x wᵀ and dx = dy w for bf16 rows, with W decoded piece by piece into an L1 cache. K % block_size == 0.
struct FourBitGemm {
  int64_t group_rows;                     // rows of x or dy that are packed and multiplied together at most
  int64_t min_block, min_block_backward;  // the smallest block sizes
  int64_t max_rows, max_rows_backward;    // with more rows, panels are faster: measured at K = N = 4096

  // Rows of W that one call of `forward` takes at most, and the floats of its aligned scratch.
  int64_t (*weight_rows)(int64_t M);
  int64_t (*forward_scratch)(int64_t M, int64_t row_blocks);

  // Chunks [first, last) of rows [m0, m1) to their place in `out`, packed_words(m1 - m0, K).
  void (*pack_forward)(const Rows& x, int64_t m0, int64_t m1, int64_t K, int64_t first, int64_t last, uint32_t* out);
  // y[m, n] = sum_k x[m, k] w[n, k] for m < M and n in [n0, n1); y fp32 or bf16 [M, ldy]. `absmax`: of the blocks of
  // these rows of W.
  void (*forward)(const uint32_t* x, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1,
                  float* scratch, void* y, Type type, int64_t ldy);

  // As `pack_forward`, of dy and N.
  void (*pack_backward)(const Rows& dy, int64_t m0, int64_t m1, int64_t N, int64_t first, int64_t last, uint32_t* out);
  // dx[m, k] = sum_n dy[m, n] w[n, k] for m < M and k in [k0, k1), whole parts of a strip. `absmax`: of all blocks of
  // W. `scratch`: aligned, strip_floats(N) + padded_rows(M) * kStripPart.
  void (*backward)(const uint32_t* dy, int64_t M, int64_t N, int64_t K, const Packed& w, const float* absmax,
                   int64_t k0, int64_t k1, float* scratch, void* dx, Type type, int64_t ldx);
};

inline int64_t padded_rows(int64_t rows) { return (rows + 31) / 32 * 32; }
inline int64_t packed_words(int64_t rows, int64_t width) { return padded_rows(rows) * whole_chunks(width) / 2; }
inline int64_t strip_floats(int64_t N) { return (N * (kStrip / 8 + kStrip / kStripPart) + 15) / 16 * 16; }

struct FourBitKernels {
  // The blocks [first, last) of the n values `w` to nibbles and absmax, as bitsandbytes rounds them on a CPU.
  void (*encode)(const void* w, Type type, int64_t n, FourBit to, int64_t block_size, int64_t first, int64_t last,
                 uint8_t* packed, float* absmax);

  // `rows` times `width` values of the weight to out [rows, width]; the first starts at `begin`, each `stride` after
  // the one before.
  void (*decode)(const Packed& w, int64_t begin, int64_t width, int64_t rows, int64_t stride, void* out, Type type);

  // absmax of blocks [first, last) in fp32.
  void (*absmax)(const Absmax& of, int64_t first, int64_t last, float* out);

  const FourBitGemv* gemv;
  const FourBitGemm* gemm;  // or null
};

}  // namespace fastpeft
