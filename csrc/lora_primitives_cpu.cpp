// lora_shrink, lora_expand, lora_grad_b and lora_grad_a on the CPU.
//
// Signatures and meaning: fastpeft/reference/<op>.py.
#include "lora_adapter.h"

namespace fastpeft {
namespace {

Tensor lora_shrink(Tensor x, Tensor a, double p, optional<Tensor> seed) {
  const int64_t M = x.size(0), K = x.size(1), R = a.size(0);
  Tensor s = empty_like(x, {M, R});
  const Mask mask = mask_of(p, seed);
  const Tensor readable_a = readable(a);
  const Panel panel(transposed(readable_a), K, R, Use::reduce, type_of(x));
  parallel_rows(M, [&](int64_t m0, int64_t m1) {
    Scratch own((m1 - m0) * panel.ld);
    shrink_rows(x, panel, mask, R, m0, m1, own);
    put_rows(own, panel.ld, m0, m1 - m0, R, s.mutable_data_ptr(), type_of(s));
  });
  return s;
}

}  // namespace

void expand_into(const Tensor& y, const Tensor& s, const Tensor& b, const float* bias, double scale, bool add) {
  const int64_t R = s.size(1), N = b.size(0), ld = padded(R);
  const Tensor readable_b = readable(b);
  const Panel panel(transposed(readable_b), R, N, Use::expand, type_of(y));
  parallel_rows(s.size(0), [&](int64_t m0, int64_t m1) {
    Scratch own((m1 - m0) * ld);
    get_rows(s, m0, m1 - m0, own, ld);
    kernels().expand(own, ld, m0, m1, R, panel.data, panel.ld, bias, static_cast<float>(scale), kAll, add, y.mutable_data_ptr(), type_of(y),
                     y.stride(0), N);
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

std::tuple<Tensor, Tensor, Tensor> lora_grad_b(Tensor dy, Tensor s, Tensor b, double scale, bool need_db, bool need_bias,
                                               optional<Tensor> mask) {
  const int64_t M = dy.size(0), N = dy.size(1), R = b.size(1);
  Tensor ds = empty_like(dy, {M, R}), db = need_db ? empty_like(b, {N, R}) : nothing(b);
  Tensor sums = empty({need_bias ? N : 0}, ScalarType::Float);
  const Tensor readable_b = readable(b);
  const Panel panel(strided(readable_b), N, R, Use::reduce, type_of(dy));
  const Tasks tasks(M);
  Partials grad(tasks.count, need_db ? R : 0, N), bias(tasks.count, need_bias ? 1 : 0, N);
  parallel(tasks.count, [&](int64_t first, int64_t last) {
    Scratch own(std::min(kRows, M) * panel.ld), left(std::min(kRows, M) * panel.ld);
    for (int64_t task = first; task < last; ++task) {
      float* db_part = need_db ? grad.clear(task) : nullptr;
      float* bias_part = need_bias ? bias.clear(task) : nullptr;
      for_blocks(tasks.begin(task), tasks.begin(task + 1), [&](int64_t m0, int64_t m1) {
        if (need_db) get_rows(s, m0, m1 - m0, left, panel.ld);
        kernels().reduce(rows_of(dy), m0, m1, N, kAll, panel.data, panel.ld, R, static_cast<float>(scale), own, left, panel.ld, db_part, grad.ld,
                         bias_part);
        put_rows(own, panel.ld, m0, m1 - m0, R, ds.mutable_data_ptr(), type_of(ds));
      });
    }
  });
  if (need_db) grad.finish(db, static_cast<float>(scale), true, mask);
  if (need_bias) bias.finish(sums, 1.0f, false);
  return {ds, db, sums};
}

}  // namespace

Tensor grad_a_into(const Tensor& dx, const Tensor& x, const Tensor& ds, const Tensor& a, double p, const optional<Tensor>& seed,
                   bool need_dx, bool need_da, bool add, const optional<Tensor>& bits_a) {
  const int64_t M = ds.size(0), K = a.size(1), R = a.size(0), ld = padded(R);
  Tensor da = need_da ? empty_like(a, {R, K}) : nothing(a);
  const Mask mask = mask_of(p, seed);
  const Tensor readable_a = readable(a);
  const Panel panel(strided(readable_a), need_dx ? R : 0, K, Use::expand, type_of(dx));
  const Tasks tasks(M);
  Partials grad(tasks.count, need_da ? R : 0, K);
  parallel(tasks.count, [&](int64_t first, int64_t last) {
    Scratch left(std::min(kRows, M) * ld);
    BlockMask masks(mask, K);
    for (int64_t task = first; task < last; ++task) {
      float* part = need_da ? grad.clear(task) : nullptr;
      for_blocks(tasks.begin(task), tasks.begin(task + 1), [&](int64_t m0, int64_t m1) {
        get_rows(ds, m0, m1 - m0, left, ld);
        const Bits bits = masks.of(m0, m1);
        if (need_da)
          kernels().reduce(rows_of(x), m0, m1, K, bits, nullptr, 0, R, 1.0f, nullptr, left, ld, part, grad.ld, nullptr);
        if (need_dx)
          kernels().expand(left, ld, m0, m1, R, panel.data, panel.ld, nullptr, mask.factor, bits, add, dx.mutable_data_ptr(),
                           type_of(dx), K, K);
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

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) {
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("lora_expand", TORCH_BOX(&lora_expand));
  m.impl("lora_expand_add", TORCH_BOX(&lora_expand_add));
  m.impl("lora_grad_b", TORCH_BOX(&lora_grad_b));
  m.impl("lora_grad_a", TORCH_BOX(&lora_grad_a));
}

}  // namespace fastpeft
