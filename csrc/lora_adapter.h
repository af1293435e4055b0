// What LoRA adds around a base product: everything but y += x wᵀ and dx += dy w.
//
// Two orders. Adapter first: it writes the sum, and the vendor GEMM adds to it, which costs nothing with fp32's. Base
// first: the adapter adds to it, as oneDNN's bf16 GEMM reads what it adds to from a cold cache: 2 to 4 % of its time.
#pragma once
#include <tuple>

#include "tasks.h"

namespace fastpeft {

// sum [M, N] = base + bias + scale · (s bᵀ + lora_bias) and s = drop(x) aᵀ [M, R] in x's type. The sum is `base` itself,
// written over; without one, a new tensor of `type`, for the base product to be added to.
std::tuple<Tensor, Tensor> adapter_fwd(const Tensor& x, int64_t N, const Tensor& a, const Tensor& b,
                                       const optional<Tensor>& bias, const optional<Tensor>& lora_bias, double scale,
                                       double p, const optional<Tensor>& seed, ScalarType type,
                                       const optional<Tensor>& base = {});

struct AdapterNeeds {
  bool dx, da, db, bias;
};

struct AdapterGrads {  // [0] where not needed
  Tensor dx;           // [M, K]: base and the adapter's share, as in adapter_fwd
  Tensor da, db;       // in the types of a and b
  Tensor bias;         // fp32 [N], sums of dy
};

AdapterGrads adapter_bwd(const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& s, double scale,
                         double p, const optional<Tensor>& seed, AdapterNeeds need, ScalarType type,
                         const optional<Tensor>& base = {});

}  // namespace fastpeft
