// lora_linear on the CPU: the primitives in one visit of each block of rows, and the vendor GEMM.
//
// Signatures and meaning: fastpeft/reference/lora_linear.py.
#include <atomic>

#include "tasks.h"

namespace fastpeft {
namespace {

// Which low-precision GEMMs this torch has at the speed of its processor; set once on import.
std::atomic<bool> native_bf16{false}, native_f16{false};

bool native(Type type) { return type == Type::f32 || (type == Type::bf16 ? native_bf16 : native_f16); }

// The base product with x in fp32, panel by panel of W: torch's own bf16 and fp16 products on a processor without such
// instructions run at 1 to 12 GFLOP/s, the fp32 one at its peak. y fp32 [M, N] += x wᵀ.
constexpr int64_t kUpcastRows = 512;

Tensor to_f32(const Tensor& t) {  // [rows, cols], last dimension contiguous
  Tensor out = torch::stable::new_empty(t, t.sizes(), std::make_optional(ScalarType::Float));
  float* data = static_cast<float*>(out.mutable_data_ptr());
  const int64_t cols = t.size(1);
  parallel_rows(t.size(0), [&](int64_t m0, int64_t m1) { get_rows(t, m0, m1 - m0, data + m0 * cols, cols); });
  return out;
}

void from_f32(const Tensor& src, const Tensor& out) {
  const float* data = static_cast<const float*>(src.const_data_ptr());
  const int64_t cols = src.size(1);
  parallel_rows(src.size(0), [&](int64_t m0, int64_t m1) {
    put_rows(data + m0 * cols, cols, m0, m1 - m0, cols, out.mutable_data_ptr(), type_of(out));
  });
}

template <class F>
void upcast_panels(const Tensor& w, F f) {
  for (int64_t n = 0; n < w.size(0); n += kUpcastRows) {
    const int64_t rows = std::min(kUpcastRows, w.size(0) - n);
    Tensor panel = torch::stable::narrow(const_cast<Tensor&>(w), 0, n, rows);
    if (panel.stride(1) != 1) panel = torch::stable::contiguous(panel);
    f(to_f32(panel), n, rows);
  }
}

Tensor columns(const Tensor& t, int64_t n, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(t), 1, n, count);
}


// s and the rank-R part of y in one visit of each block of rows; then the vendor GEMM adds the base product (beta = 1).
std::tuple<Tensor, Tensor> lora_linear_fwd(Tensor x, Tensor w, Tensor a, Tensor b, optional<Tensor> bias,
                                           optional<Tensor> lora_bias, double scale, double p, optional<Tensor> seed,
                                           std::string) {
  const int64_t M = x.size(0), K = x.size(1), N = w.size(0), R = a.size(0);
  const bool upcast = !native(type_of(x));
  Tensor y = empty_like(x, {M, N}), s = empty_like(x, {M, R});
  Tensor sum = upcast ? empty({M, N}, ScalarType::Float) : y;
  const Mask mask = mask_of(p, seed);
  const Tensor readable_a = readable(a), readable_b = readable(b);
  const Panel down(transposed(readable_a), K, R, mask.factor);
  const Panel up(transposed(readable_b), R, N, static_cast<float>(scale));
  const auto start = start_row(bias, lora_bias, N, static_cast<float>(scale));
  parallel_rows(M, [&](int64_t m0, int64_t m1) {
    Scratch own((m1 - m0) * down.ld);
    shrink_rows(x, down, mask, R, m0, m1, own);
    put_rows(own, down.ld, m0, m1 - m0, R, s.mutable_data_ptr(), type_of(s));
    kernels().expand(own, down.ld, m0, m1, R, up.data, up.ld, start ? start->data : nullptr, kAll, false,
                     sum.mutable_data_ptr(), type_of(sum), N, N);
  });
  if (upcast && M) {
    const Tensor x32 = to_f32(x);
    upcast_panels(w, [&](const Tensor& w32, int64_t n, int64_t count) { gemm(columns(sum, n, count), x32, transpose(w32)); });
    from_f32(sum, y);
  } else {
    gemm(y, x, transpose(w));
  }
  return {y, s};
}

// One visit of each block of rows gives ds, db, the bias gradient, da and the adapter's share of dx; then dx += dy w.
std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_bwd(Tensor dy, Tensor x, Tensor w, Tensor a, Tensor b, Tensor s,
                                                           double scale, double p, optional<Tensor> seed, std::string,
                                                           bool need_dx, bool need_da, bool need_db, bool need_bias) {
  const int64_t M = dy.size(0), N = w.size(0), K = w.size(1), R = a.size(0), ld = padded(R);
  const bool upcast = !native(type_of(dy));
  Tensor dx = need_dx ? empty_like(dy, {M, K}) : nothing(dy), da = need_da ? empty_like(a, {R, K}) : nothing(a);
  Tensor db = need_db ? empty_like(b, {N, R}) : nothing(b);
  Tensor sums = empty({need_bias ? N : 0}, ScalarType::Float);
  Tensor sum = need_dx && upcast ? empty({M, K}, ScalarType::Float) : dx;
  const Mask mask = mask_of(p, seed);
  const Tensor readable_a = readable(a), readable_b = readable(b);
  const Panel down(strided(readable_a), need_dx ? R : 0, K, mask.factor);
  const Panel up(strided(readable_b), N, R, static_cast<float>(scale));
  const Tasks tasks(M);
  Partials grad_a(tasks.count, need_da ? R : 0, K), grad_b(tasks.count, need_db ? R : 0, N);
  Partials bias(tasks.count, need_bias ? 1 : 0, N);
  const bool need_ds = need_dx || need_da;
  parallel(tasks.count, [&](int64_t first, int64_t last) {
    Scratch ds(std::min(kRows, M) * ld), left(std::min(kRows, M) * ld);
    BlockMask masks(mask, K);
    for (int64_t task = first; task < last; ++task) {
      float* a_part = need_da ? grad_a.clear(task) : nullptr;
      float* b_part = need_db ? grad_b.clear(task) : nullptr;
      float* bias_part = need_bias ? bias.clear(task) : nullptr;
      for_blocks(tasks.begin(task), tasks.begin(task + 1), [&](int64_t m0, int64_t m1) {
        if (need_db) get_rows(s, m0, m1 - m0, left, ld);
        if (need_ds || need_db || need_bias)
          kernels().reduce(rows_of(dy), m0, m1, N, kAll, up.data, up.ld, R, need_ds ? ds.data : nullptr, left, ld,
                           b_part, grad_b.ld, bias_part);
        if (!need_ds) return;
        const Bits bits = masks.of(m0, m1);
        if (need_da)
          kernels().reduce(rows_of(x), m0, m1, K, bits, nullptr, 0, R, nullptr, ds, ld, a_part, grad_a.ld, nullptr);
        if (need_dx)
          kernels().expand(ds, ld, m0, m1, R, down.data, down.ld, nullptr, bits, false, sum.mutable_data_ptr(),
                           type_of(sum), K, K);
      });
    }
  });
  if (need_da) grad_a.finish(da, mask.factor, false);
  if (need_db) grad_b.finish(db, static_cast<float>(scale), true);
  if (need_bias) bias.finish(sums, 1.0f, false);
  if (need_dx && upcast && M) {
    const Tensor dy32 = to_f32(dy);
    upcast_panels(w, [&](const Tensor& w32, int64_t n, int64_t count) { gemm(sum, columns(dy32, n, count), w32); });
    from_f32(sum, dx);
  } else if (need_dx) {
    gemm(dx, dy, w);
  }
  return {dx, da, db, sums};
}

}  // namespace

void set_native_gemm(bool bf16, bool f16) {
  native_bf16 = bf16;
  native_f16 = f16;
}

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&lora_linear_bwd));
}

}  // namespace fastpeft
