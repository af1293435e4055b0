// What LoRA adds around a base product: everything but y += x wᵀ and dx += dy w.
#pragma once
#include <tuple>

#include "tasks.h"

namespace fastpeft {

// sum [M, N] = bias + scale · (s bᵀ + lora_bias) in `type`, for the base product to be added to; and s = drop(x) aᵀ
// [M, R] in x's type.
std::tuple<Tensor, Tensor> adapter_fwd(const Tensor& x, int64_t N, const Tensor& a, const Tensor& b,
                                       const optional<Tensor>& bias, const optional<Tensor>& lora_bias, double scale,
                                       double p, const optional<Tensor>& seed, ScalarType type);

struct AdapterNeeds {
  bool dx, da, db, bias;
};

struct AdapterGrads {  // [0] where not needed
  Tensor dx;           // [M, K], the adapter's share alone, in the type that was asked for
  Tensor da, db;       // in the types of a and b
  Tensor bias;         // fp32 [N], sums of dy
};

AdapterGrads adapter_bwd(const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& s, double scale,
                         double p, const optional<Tensor>& seed, AdapterNeeds need, ScalarType type);

}  // namespace fastpeft
