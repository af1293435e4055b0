// s = drop(x) aᵀ on the CPU.
//
// Signature and meaning: fastpeft/reference/lora_shrink.py.
#include "cpu/lora_pass.h"

namespace fastpeft {
namespace {

Tensor lora_shrink(Tensor x, Tensor a, double p, optional<Tensor> seed) {
  const int64_t M = x.size(0), K = x.size(1), R = a.size(0);
  Tensor s = empty_like(x, {M, R});
  const Mask mask = mask_of(p, seed);
  const Tensor readable_a = readable(a);
  const Panel panel(transposed(readable_a), K, R, Use::reduce, type_of(x));
  parallel_rows(M, [&](int64_t m0, int64_t m1) {
    Scratch s_block((m1 - m0) * panel.ld);
    shrink_rows(x, panel, mask, R, m0, m1, s_block);
    store_rows(s_block, panel.ld, m0, m1 - m0, R, s.mutable_data_ptr(), type_of(s));
  });
  return s;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) { m.impl("lora_shrink", TORCH_BOX(&lora_shrink)); }

}  // namespace fastpeft
