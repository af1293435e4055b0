// The products of a 4-bit weight on a CPU, x wᵀ and dy w, and the paths that make them.
#pragma once
#include <string>

#include "cpu/packed_weight.h"

namespace fastpeft {

struct Weight {
  Packed packed;
  int64_t N, K;
};

enum class Path {
  gemv,    // a few rows of x with W as it is stored
  fused,   // W decoded piece by piece for the units that multiply bf16
  panels,  // W decoded panel by panel for the vendor GEMM
};

std::string name_of(Path path);

// The path of the forward and of the backward pass of M rows: the fastest, or the one that set_fourbit_path has named.
// Throws where that one cannot make the product.
Path forward_path(int64_t M, int64_t K, Type type, int64_t block_size);
Path backward_path(int64_t M, int64_t N, int64_t K, Type type, int64_t block_size);

// "auto" or the name of a path, for tests and measurements; false where there is no such path.
bool set_fourbit_path(const std::string& name);

// Whether the product is written in the type of x, rounded once; otherwise in fp32.
bool writes_type_of_x(Path path, int64_t M, Type type);

// y = x wᵀ and dx = dy w, none of them empty. The result is in the type that writes_type_of_x names.
void multiply_forward(Path path, const Weight& w, const Tensor& x, const Tensor& y);
void multiply_backward(Path path, const Weight& w, const Tensor& dy, const Tensor& dx);

}  // namespace fastpeft
