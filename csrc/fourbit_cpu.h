// The CPU kernels of 4-bit weights, one table for each instruction set; the format: fourbit.h.
#pragma once
#include "cpu_kernels.h"
#include "fourbit.h"

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
};

// The weights of a vector of nibbles at most: arranged rows of x are padded with zeros to a multiple.
constexpr int64_t kNibbles = 128;
constexpr int64_t arranged(int64_t K) { return (K + kNibbles - 1) / kNibbles * kNibbles; }

}  // namespace fastpeft
