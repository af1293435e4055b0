// ds = scale · dy b, db = scale · dyᵀ s and the sums of dy on the CPU, in one read of dy.
//
// Signature and meaning: fastpeft/reference/lora_grad_b.py.
#include "cpu/lora_pass.h"

namespace fastpeft {
namespace {

std::tuple<Tensor, Tensor, Tensor> lora_grad_b(Tensor dy, Tensor s, Tensor b, double scale, bool need_db,
                                               bool need_bias, optional<Tensor> mask) {
  const int64_t M = dy.size(0), N = dy.size(1), R = b.size(1);
  Tensor ds = empty_like(dy, {M, R}), db = need_db ? empty_like(b, {N, R}) : nothing(b);
  Tensor sums = empty({need_bias ? N : 0}, ScalarType::Float);
  const Tensor readable_b = readable(b);
  const Panel panel(strided(readable_b), N, R, Use::reduce, type_of(dy));
  const Tasks tasks(M);
  Partials grad(tasks.count, need_db ? R : 0, N), bias(tasks.count, need_bias ? 1 : 0, N);
  parallel(tasks.count, [&](int64_t first, int64_t last) {
    Scratch ds_block(std::min(kRows, M) * panel.ld), s_block(std::min(kRows, M) * panel.ld);
    for (int64_t task = first; task < last; ++task) {
      float* db_part = need_db ? grad.clear(task) : nullptr;
      float* bias_part = need_bias ? bias.clear(task) : nullptr;
      for_blocks(tasks.begin(task), tasks.begin(task + 1), [&](int64_t m0, int64_t m1) {
        if (need_db) load_rows(s, m0, m1 - m0, s_block, panel.ld);
        kernels().reduce(rows_of(dy), m0, m1, N, kAll, panel.data, panel.ld, R, static_cast<float>(scale), ds_block,
                         s_block, panel.ld, db_part, grad.ld, bias_part);
        store_rows(ds_block, panel.ld, m0, m1 - m0, R, ds.mutable_data_ptr(), type_of(ds));
      });
    }
  });
  if (need_db) grad.finish(db, static_cast<float>(scale), true, mask);
  if (need_bias) bias.finish(sums, 1.0f, false);
  return {ds, db, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) { m.impl("lora_grad_b", TORCH_BOX(&lora_grad_b)); }

}  // namespace fastpeft
