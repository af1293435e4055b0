// lora_linear on the CPU: the vendor GEMM, and the adapter's share in one pass over every block of rows.
//
// Signatures and meaning: fastpeft/reference/lora_linear.py.
#include "cpu/base_product.h"
#include "cpu/lora_adapter.h"

namespace fastpeft {
namespace {

std::tuple<Tensor, Tensor> lora_linear_fwd(Tensor x, Tensor w, Tensor a, Tensor b, optional<Tensor> bias,
                                           optional<Tensor> lora_bias, double scale, double p, optional<Tensor> seed) {
  Tensor s = nothing(x);
  const Tensor y = product_with(
      x, w, [&](const Tensor& sum, bool add) { s = adapter_fwd(x, a, b, bias, lora_bias, scale, p, seed, sum, add); });
  return {y, s};
}

// One pass over every block of rows gives ds, db, the bias gradient, da and the adapter's share of dx.
std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_bwd(Tensor dy, Tensor x, Tensor w, Tensor a, Tensor b, Tensor s,
                                                           double scale, double p, optional<Tensor> seed, bool need_dx,
                                                           bool need_da, bool need_db, bool need_bias,
                                                           optional<Tensor> mask_a, optional<Tensor> mask_b) {
  AdapterGrads grads{nothing(a), nothing(b), nothing(dy)};
  const auto adapter = [&](const Tensor& sum, bool add) {
    grads =
        adapter_bwd(dy, x, a, b, s, scale, p, seed, {need_dx, need_da, need_db, need_bias}, sum, add, mask_a, mask_b);
  };
  const Tensor dx = need_dx ? product_dx_with(dy, w, adapter) : nothing(dy);
  if (!need_dx) adapter(dx, false);
  return {dx, grads.da, grads.db, grads.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&lora_linear_bwd));
}

}  // namespace fastpeft
