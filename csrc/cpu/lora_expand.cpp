// y (+)= bias + scale · s bᵀ on the CPU.
//
// Signature and meaning: fastpeft/reference/lora_expand.py.
#include "cpu/lora_adapter.h"
#include "cpu/lora_pass.h"

namespace fastpeft {

void expand_into(const Tensor& y, const Tensor& s, const Tensor& b, const float* bias, double scale, bool add) {
  const int64_t R = s.size(1), N = b.size(0), ld = padded(R);
  const Tensor readable_b = readable(b);
  const Panel panel(transposed(readable_b), R, N, Use::expand, type_of(y));
  parallel_rows(s.size(0), [&](int64_t m0, int64_t m1) {
    Scratch s_block((m1 - m0) * ld);
    load_rows(s, m0, m1 - m0, s_block, ld);
    kernels().expand(s_block, ld, m0, m1, R, panel.data, panel.ld, bias, static_cast<float>(scale), kAll, add,
                     y.mutable_data_ptr(), type_of(y), y.stride(0), N);
  });
}

namespace {

Tensor lora_expand(Tensor s, Tensor b, optional<Tensor> bias, optional<Tensor> lora_bias, double scale) {
  Tensor y = empty_like(s, {s.size(0), b.size(0)});
  const auto start = start_row(bias, lora_bias, b.size(0), static_cast<float>(scale));
  expand_into(y, s, b, start ? start->data : nullptr, scale, false);
  return y;
}

void lora_expand_add(Tensor y, Tensor s, Tensor b, double scale) { expand_into(y, s, b, nullptr, scale, true); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) {
  m.impl("lora_expand", TORCH_BOX(&lora_expand));
  m.impl("lora_expand_add", TORCH_BOX(&lora_expand_add));
}

}  // namespace fastpeft
