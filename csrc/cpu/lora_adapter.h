// What LoRA adds around a base product: everything but y += x wᵀ and dx += dy w.
//
// There are two orders. Adapter first: it writes the sum and the vendor GEMM adds to it, which costs the fp32 GEMM
// nothing. Base first: the adapter adds to the GEMM's result, because oneDNN's bf16 GEMM would read the sum from a cold
// cache, 2 to 4 % of its time.
#pragma once
#include "host/tensor.h"

namespace fastpeft {

// y [M, N] of any type = bias + scale · (s bᵀ + lora_bias); with `add`, += the same, as y holds the base product.
// Returns s = drop(x) aᵀ [M, R] in x's type; for fp16 in fp32, as s may exceed 65504 even if no gradient does.
Tensor adapter_fwd(const Tensor& x, const Tensor& a, const Tensor& b, const optional<Tensor>& bias,
                   const optional<Tensor>& lora_bias, double scale, double p, const optional<Tensor>& seed,
                   const Tensor& y, bool add);

struct AdapterNeeds {
  bool dx, da, db, bias;
};

struct AdapterGrads {  // [0] where not needed
  Tensor da, db;       // in the types of a and b
  Tensor bias;         // fp32 [N], sums of dy
};

// If needed, dx [M, K] receives its share as y does in adapter_fwd. mask_a [R, ceil(K / 8)] and mask_b [R, ceil(N /
// 8)]: one bit for every element of da and dbᵀ that may differ from zero.
AdapterGrads adapter_bwd(const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& s,
                         double scale, double p, const optional<Tensor>& seed, AdapterNeeds need, const Tensor& dx,
                         bool add, const optional<Tensor>& mask_a = std::nullopt,
                         const optional<Tensor>& mask_b = std::nullopt);

// y [M, N] = bias + scale · s bᵀ; with `add`, += scale · s bᵀ. bias: of start_row, or null.
void expand_into(const Tensor& y, const Tensor& s, const Tensor& b, const float* bias, double scale, bool add);

// da [R, K] = dsᵀ drop(x), and dx [M, K] = mask ∘ (ds a) / keep; with `add`, += the same. [0] where not needed.
Tensor grad_a_into(const Tensor& dx, const Tensor& x, const Tensor& ds, const Tensor& a, double p,
                   const optional<Tensor>& seed, bool need_dx, bool need_da, bool add,
                   const optional<Tensor>& mask = std::nullopt);

}  // namespace fastpeft
