// The CPU kernels of 4-bit weights, one table for each instruction set; the format: fourbit.h.
#pragma once
#include "simd/kernels.h"
#include "shared/fourbit.h"

namespace fastpeft {

struct Absmax {         // of each block
  const float* plain;   // or null, and then code[codes[i]] * scale[i / kNestedBlock] + offset
  const uint8_t* codes;
  const float* code;    // [256]
  const float* scale;
  float offset;
};

struct Packed {
  const uint8_t* data;
  Absmax absmax;
  FourBit type;
  int64_t block_size;
};

// Products of bf16 x or dy with W [N, K] on tile registers, where K % block_size == 0 and block_size >= kLeastTiledBlock: of
// at most kTiledGroup rows [m0, m1) at a time, which `arrange` puts in a kernel's order. `sums`: aligned scratch.
constexpr int64_t kStripPart = 64, kStrip = 256, kTiledWeights = 128, kTiledGroup = 128, kLeastTiledBlock = 64;

struct FourBitTiles {
  // To tiled_floats(m1 - m0, K).
  void (*arrange_forward)(const Rows& x, int64_t m0, int64_t m1, int64_t K, int64_t block_size, uint32_t* out);
  // y[m, n] = sum_k x[m, k] w[n, k] for m < M and n in [n0, n1), tiled_weights(M) at most; y fp32 or bf16 [M, ldy]. `absmax`: of the
  // blocks of these rows of W.
  void (*forward)(const uint32_t* x, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1, void* y, Type type,
                  int64_t ldy);
  // To tiled_floats(m1 - m0, N).
  void (*arrange_backward)(const Rows& dy, int64_t m0, int64_t m1, int64_t N, uint32_t* out);
  // dx[m, k] = sum_n dy[m, n] w[n, k] for m < M and k in [k0, k1), whole parts of a strip, and kStrip at most. `absmax`: of all blocks
  // of W. `room`: strip_room(N) + tiled_rows(M) * kStripPart.
  void (*backward)(const uint32_t* dy, int64_t M, int64_t N, int64_t K, const Packed& w, const float* absmax, int64_t k0, int64_t k1,
                   float* room, void* dx, Type type, int64_t ldx);
};

inline int64_t tiled_rows(int64_t rows) { return (rows + 31) / 32 * 32; }
inline int64_t strip_room(int64_t N) { return (N * (kStrip / 8 + kStrip / kStripPart) + 15) / 16 * 16; }
constexpr int64_t tiled_weights(int64_t M) { return M > 16 ? 32 : 64; }
inline int64_t tiled_floats(int64_t rows, int64_t width) { return tiled_rows(rows) * ((width + kTiledWeights - 1) / kTiledWeights * kTiledWeights) / 2; }

// The product of at most kByteRows rows of bf16 or fp16 x with W in products of bytes, of the same weights.
constexpr int64_t kByteRows = 2;

struct FourBitBytes {
  // Bytes of the aligned room that x is put in.
  int64_t (*room)(int64_t M, int64_t K);
  // False, and no use of the room, where x has values that integers do not hold.
  bool (*arrange)(const Rows& x, int64_t K, void* room);
  // y[m, n] = sum_k x[m, k] w[n, k] in fp32 for n in [n0, n1).
  void (*product)(const void* room, int64_t M, int64_t K, const Packed& w, int64_t n0, int64_t n1, float* y, int64_t ldy);
};

// The product of any number of bf16 rows with W decoded block by block in an L1 cache, where K % block_size == 0: of `count` rows at a time,
// and of at most kBlockedWeights rows of W.
constexpr int64_t kBlockedWeights = 32, kBlockedColumns = 128;

struct FourBitBlocks {
  // Columns [first, last) · kBlockedColumns of rows [m0, m1), to (m1 - m0) * arranged(K) / 2 words.
  void (*arrange_forward)(const Rows& x, int64_t m0, int64_t m1, int64_t K, int64_t first, int64_t last, uint32_t* out);
  // y[m, n] = sum_k x[m, k] w[n, k] for m < M and n in [n0, n1); y fp32 or bf16 [M, ldy]. `absmax`: of the blocks of these rows of
  // W. `room`: blocked_room(M, K / block_size), aligned.
  void (*forward)(const uint32_t* x, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1, float* room, void* y,
                  Type type, int64_t ldy);
  // As `arrange_forward`, of dy and N.
  void (*arrange_backward)(const Rows& dy, int64_t m0, int64_t m1, int64_t N, int64_t first, int64_t last, uint32_t* out);
  // As FourBitTiles::backward, where block_size >= kLeastTiledBlock.
  void (*backward)(const uint32_t* dy, int64_t M, int64_t N, int64_t K, const Packed& w, const float* absmax, int64_t k0, int64_t k1,
                   float* room, void* dx, Type type, int64_t ldx);
};

constexpr int64_t blocked_room(int64_t M, int64_t row_blocks) { return (M + row_blocks) * kBlockedWeights; }

struct FourBitKernels {
  // The blocks [first, last) of the n values `w` to nibbles and absmax, as bitsandbytes rounds them on a CPU.
  void (*encode)(const void* w, Type type, int64_t n, FourBit to, int64_t block_size, int64_t first, int64_t last, uint8_t* packed,
                 float* absmax);

  // rows runs of `width` values of the weight, the first from `begin` on, each `stride` after the last, to out [rows, width].
  void (*decode)(const Packed& w, int64_t begin, int64_t width, int64_t rows, int64_t stride, void* out, Type type);

  // absmax of blocks [first, last) in fp32.
  void (*absmax)(const Absmax& of, int64_t first, int64_t last, float* out);

  // y[m, n] = sum_k x[m, k] w[n, k] in fp32 for n in [n0, n1) and every row of x, where K % block_size == 0: the weights
  // of a vector of nibbles lie in the order of the nibble in its lane, and `arrange` puts x in that order. It writes
  // arranged(K) values a row: bf16 where `in_pairs`, else fp32. `absmax` holds that of the blocks of rows [n0, n1).
  bool (*in_pairs)(Type x);
  // The rows of x up to which that is faster than to decode the weight once and multiply: measured at K = N = 4096.
  int64_t (*few_rows)(Type x);
  void (*arrange)(Rows x, int64_t K, void* out);
  void (*product)(const void* x, bool pairs, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1, float* y,
                  int64_t ldy);

  const FourBitTiles* tiles;  // or null
  const FourBitBytes* bytes;  // or null
  const FourBitBlocks* blocks;  // or null
};

// The weights of a vector of nibbles at most: arranged rows of x are padded with zeros to a multiple.
constexpr int64_t kNibbles = 128;
constexpr int64_t arranged(int64_t K) { return (K + kNibbles - 1) / kNibbles * kNibbles; }

}  // namespace fastpeft
