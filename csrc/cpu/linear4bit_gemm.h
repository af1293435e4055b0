// The products of a 4-bit weight on the CPU, x wᵀ and dy w, and the ways they are made.
#pragma once
#include "cpu/packed_weight.h"

namespace fastpeft {

struct Weight {
  Packed packed;
  int64_t N, K;
};

// How a product with rows of x of this type is made.
enum class Way {
  bytes,    // one or two rows in products of bytes, where integers hold x
  tiles,    // on tile registers
  nibbles,  // a few rows on the nibbles as they lie
  blocks,   // W decoded block by block for vectors
  panels,   // W decoded panel by panel for the vendor GEMM
};

// Of the forward and of the backward pass of M rows.
Way way_of(int64_t M, int64_t K, Type type, int64_t block_size);
Way way_back(int64_t M, int64_t N, int64_t K, Type type, int64_t block_size);

// Whether such a product is written in x's own type, rounded once; else in fp32.
bool in_own_type(Way way, int64_t M, Type type);

// y = x wᵀ and dx = dy w, none of them empty, to such a tensor.
void multiply_rows(Way way, const Weight& w, const Tensor& x, const Tensor& y);
void multiply_columns(Way way, const Weight& w, const Tensor& dy, const Tensor& dx);

}  // namespace fastpeft
