// da = dsᵀ drop(x) and dx = drop(ds a) on the CPU.
//
// Signature and meaning: fastpeft/reference/lora_grad_a.py.
#include "cpu/lora_adapter.h"
#include "cpu/lora_pass.h"

namespace fastpeft {

Tensor grad_a_into(const Tensor& dx, const Tensor& x, const Tensor& ds, const Tensor& a, double p,
                   const optional<Tensor>& seed, bool need_dx, bool need_da, bool add, const optional<Tensor>& bits_a) {
  const int64_t M = ds.size(0), K = a.size(1), R = a.size(0), ld = padded(R);
  Tensor da = need_da ? empty_like(a, {R, K}) : nothing(a);
  const Mask mask = mask_of(p, seed);
  const Tensor readable_a = readable(a);
  const Panel panel(strided(readable_a), need_dx ? R : 0, K, Use::expand, type_of(dx));
  const Tasks tasks(M);
  Partials grad(tasks.count, need_da ? R : 0, K);
  parallel(tasks.count, [&](int64_t first, int64_t last) {
    Scratch ds_block(std::min(kRows, M) * ld);
    BlockMask masks(mask, K);
    for (int64_t task = first; task < last; ++task) {
      float* part = need_da ? grad.clear(task) : nullptr;
      for_blocks(tasks.begin(task), tasks.begin(task + 1), [&](int64_t m0, int64_t m1) {
        load_rows(ds, m0, m1 - m0, ds_block, ld);
        const Bits bits = masks.of(m0, m1);
        if (need_da)
          kernels().reduce(rows_of(x), m0, m1, K, bits, nullptr, 0, R, 1.0f, nullptr, ds_block, ld, part, grad.ld,
                           nullptr);
        if (need_dx)
          kernels().expand(ds_block, ld, m0, m1, R, panel.data, panel.ld, nullptr, mask.factor, bits, add,
                           dx.mutable_data_ptr(), type_of(dx), K, K);
      });
    }
  });
  if (need_da) grad.finish(da, mask.factor, false, bits_a);
  return da;
}

namespace {

std::tuple<Tensor, Tensor> lora_grad_a(Tensor x, Tensor ds, Tensor a, double p, optional<Tensor> seed, bool need_dx,
                                       bool need_da, optional<Tensor> mask) {
  const Tensor dx = need_dx ? empty_like(ds, {ds.size(0), a.size(1)}) : nothing(ds);
  return {grad_a_into(dx, x, ds, a, p, seed, need_dx, need_da, false, mask), dx};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) { m.impl("lora_grad_a", TORCH_BOX(&lora_grad_a)); }

}  // namespace fastpeft
