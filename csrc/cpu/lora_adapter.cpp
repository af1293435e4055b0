// What LoRA adds around a base product on the CPU, in one pass over every block of rows, forward and backward.
#include "cpu/lora_adapter.h"

#include "cpu/lora_pass.h"

namespace fastpeft {
namespace {

// With at most R / kRanksOfRow rows (at least 1, at most kRows, which a mask holds) a and b are read as they are:
// packing them would take about as long as the products.
constexpr int64_t kRanksOfRow = 16;
// The rows of b that one task multiplies.
constexpr int64_t kTaskRows = 512;

bool is_skinny(const Tensor& x, const Tensor& a, const Tensor& b) {
  return x.size(0) > 0 && x.size(0) <= std::clamp<int64_t>(a.size(0) / kRanksOfRow, 1, kRows) && a.stride(1) == 1 &&
         b.stride(1) == 1;
}

// x in fp32 [M, ld], zero where dropped and past K.
void wide_rows(const Tensor& x, const Mask& mask, float* out, int64_t ld) {
  const int64_t M = x.size(0), K = x.size(1);
  std::fill(out, out + M * ld, 0.0f);
  load_rows(x, 0, M, out, ld);
  if (!mask.drop.threshold) return;
  BlockMask masks(mask, K);
  const Bits bits = masks.of(0, M);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; ++k)
      if (!(bits.row(m, 0)[k / 8] >> k % 8 & 1)) out[m * ld + k] = 0.0f;
}

// s [M, R] and y (+)= start + scale · s bᵀ for a few rows.
void adapter_skinny(const Tensor& x, const Tensor& a, const Tensor& b, const float* start, float scale,
                    const Mask& mask, const Tensor& s, const Tensor& y, bool add) {
  const int64_t M = x.size(0), K = x.size(1), N = y.size(1), R = a.size(0), ldx = padded(K), lds = padded(R);
  Scratch wide(M * ldx), thin(M * lds);
  wide_rows(x, mask, wide, ldx);
  std::fill(thin.data, thin.data + M * lds, 0.0f);
  kernels().dots(rows_of(a), K, wide, ldx, M, thin, lds);
  for (int64_t i = 0; i < M * lds; ++i) thin[i] *= mask.factor;
  store_rows(thin, lds, 0, M, R, s.mutable_data_ptr(), type_of(s));
  const Type type = type_of(y);
  parallel((N + kTaskRows - 1) / kTaskRows, [&](int64_t first, int64_t last) {
    const int64_t n0 = first * kTaskRows, count = std::min(N, last * kTaskRows) - n0;
    Scratch product(M * padded(count)), old(padded(count));
    Rows part = rows_of(b);
    part.data = static_cast<const char*>(part.data) + n0 * part.stride * size_of(part.type);
    part.count = count;
    kernels().dots(part, R, thin, lds, M, product, padded(count));
    for (int64_t m = 0; m < M; ++m) {
      void* out = static_cast<char*>(y.mutable_data_ptr()) + (m * N + n0) * size_of(type);
      float* row = product + m * padded(count);
      if (add) kernels().to_float(out, type, count, old);
      for (int64_t n = 0; n < count; ++n)
        row[n] = scale * row[n] + (start ? start[n0 + n] : 0.0f) + (add ? old[n] : 0.0f);
      kernels().from_float(row, count, out, type);
    }
  });
}

}  // namespace

Tensor adapter_fwd(const Tensor& x, const Tensor& a, const Tensor& b, const optional<Tensor>& bias,
                   const optional<Tensor>& lora_bias, double scale, double p, const optional<Tensor>& seed,
                   const Tensor& y, bool add) {
  const int64_t M = x.size(0), K = x.size(1), N = y.size(1), R = a.size(0);
  const bool f16 = type_of(x) == Type::f16;
  Tensor s = f16 ? empty({M, R}, ScalarType::Float) : empty_like(x, {M, R});
  const Mask mask = mask_of(p, seed);
  const Tensor readable_a = readable(a), readable_b = readable(b);
  const float factor = static_cast<float>(scale);
  const auto start = start_row(bias, lora_bias, N, factor);
  if (is_skinny(x, readable_a, readable_b)) {
    adapter_skinny(x, readable_a, readable_b, start ? start->data : nullptr, factor, mask, s, y, add);
    return s;
  }
  const Panel down(transposed(readable_a), K, R, Use::reduce, type_of(x));
  const Panel up(transposed(readable_b), R, N, Use::expand, type_of(y));
  parallel_rows(M, [&](int64_t m0, int64_t m1) {
    Scratch s_block((m1 - m0) * down.ld);
    shrink_rows(x, down, mask, R, m0, m1, s_block);
    store_rows(s_block, down.ld, m0, m1 - m0, R, s.mutable_data_ptr(), type_of(s));
    kernels().expand(s_block, down.ld, m0, m1, R, up.data, up.ld, start ? start->data : nullptr, factor, kAll, add,
                     y.mutable_data_ptr(), type_of(y), N, N);
  });
  return s;
}

AdapterGrads adapter_bwd(const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& s,
                         double scale, double p, const optional<Tensor>& seed, AdapterNeeds need, const Tensor& dx,
                         bool add, const optional<Tensor>& mask_a, const optional<Tensor>& mask_b) {
  const int64_t M = dy.size(0), N = dy.size(1), K = a.size(1), R = a.size(0), ld = padded(R);
  Tensor da = need.da ? empty_like(a, {R, K}) : nothing(a), db = need.db ? empty_like(b, {N, R}) : nothing(b);
  Tensor sums = empty({need.bias ? N : 0}, ScalarType::Float);
  const Mask mask = mask_of(p, seed);
  const Tensor readable_a = readable(a), readable_b = readable(b);
  const float factor = static_cast<float>(scale);
  const Panel down(strided(readable_a), need.dx ? R : 0, K, Use::expand, type_of(dx));
  const Panel up(strided(readable_b), N, R, Use::reduce, type_of(dy));
  const Tasks tasks(M);
  Partials grad_a(tasks.count, need.da ? R : 0, K), grad_b(tasks.count, need.db ? R : 0, N);
  Partials bias(tasks.count, need.bias ? 1 : 0, N);
  const bool need_ds = need.dx || need.da;
  parallel(tasks.count, [&](int64_t first, int64_t last) {
    Scratch ds(std::min(kRows, M) * ld), left(std::min(kRows, M) * ld);
    BlockMask masks(mask, K);
    for (int64_t task = first; task < last; ++task) {
      float* a_part = need.da ? grad_a.clear(task) : nullptr;
      float* b_part = need.db ? grad_b.clear(task) : nullptr;
      float* bias_part = need.bias ? bias.clear(task) : nullptr;
      for_blocks(tasks.begin(task), tasks.begin(task + 1), [&](int64_t m0, int64_t m1) {
        if (need.db) load_rows(s, m0, m1 - m0, left, ld);
        if (need_ds || need.db || need.bias)
          kernels().reduce(rows_of(dy), m0, m1, N, kAll, up.data, up.ld, R, factor, need_ds ? ds.data : nullptr, left,
                           ld, b_part, grad_b.ld, bias_part);
        if (!need_ds) return;
        const Bits bits = masks.of(m0, m1);
        if (need.da)
          kernels().reduce(rows_of(x), m0, m1, K, bits, nullptr, 0, R, 1.0f, nullptr, ds, ld, a_part, grad_a.ld,
                           nullptr);
        if (need.dx)
          kernels().expand(ds, ld, m0, m1, R, down.data, down.ld, nullptr, mask.factor, bits, add,
                           dx.mutable_data_ptr(), type_of(dx), K, K);
      });
    }
  });
  if (need.da) grad_a.finish(da, mask.factor, false, mask_a);
  if (need.db) grad_b.finish(db, factor, true, mask_b);
  if (need.bias) bias.finish(sums, 1.0f, false);
  return {da, db, sums};
}

}  // namespace fastpeft
