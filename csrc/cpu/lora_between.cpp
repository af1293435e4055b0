// lora_between on the CPU: the base product and a rank-R product whose s or ds is given.
//
// Signatures and meaning: fastpeft/reference/lora_between.py.
#include "cpu/base_product.h"
#include "cpu/lora_adapter.h"
#include "cpu/lora_pass.h"

namespace fastpeft {
namespace {

Tensor lora_between_fwd(Tensor x, Tensor w, Tensor s, Tensor b, optional<Tensor> bias, optional<Tensor> lora_bias,
                        double scale) {
  const auto start = start_row(bias, lora_bias, b.size(0), static_cast<float>(scale));
  return product_with(
      x, w, [&](const Tensor& sum, bool add) { expand_into(sum, s, b, start ? start->data : nullptr, scale, add); });
}

std::tuple<Tensor, Tensor> lora_between_bwd(Tensor dy, Tensor x, Tensor w, Tensor ds, Tensor a, double p,
                                            optional<Tensor> seed, bool need_dx, bool need_da) {
  Tensor da = nothing(a);
  const auto adapter = [&](const Tensor& sum, bool add) {
    da = grad_a_into(sum, x, ds, a, p, seed, need_dx, need_da, add);
  };
  const Tensor dx = need_dx ? product_dx_with(dy, w, adapter) : nothing(dy);
  if (!need_dx) adapter(dx, false);
  return {dx, da};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) {
  m.impl("lora_between_fwd", TORCH_BOX(&lora_between_fwd));
  m.impl("lora_between_bwd", TORCH_BOX(&lora_between_bwd));
}

}  // namespace fastpeft
