// The LoRA operators on the CPU: allocation, packing of the thin parameters, tasks on torch's thread pool, the vendor GEMM.
//
// Signatures and meaning: fastpeft/reference/<op>.py. Work is cut into tasks by shape alone, and partial sums are added in
// the order of the tasks, so that the bytes of a result do not depend on the number of threads.
#include <algorithm>
#include <atomic>

#include "dropout.h"
#include "tensor.h"

namespace fastpeft {
namespace {

using std::optional;

struct Mask {
  Dropout drop;
  float factor;  // 1 / keep
};

Mask mask_of(double p, const optional<Tensor>& seed) {
  const uint32_t threshold = seed ? dropout_threshold(p) : 0;
  const uint64_t key = threshold ? static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr())) : 0;
  return {{threshold, key}, 65536.0f / static_cast<float>(65536 - threshold)};
}

// The keep mask of one block of rows, drawn once and used by every pass over the block.
struct BlockMask {
  BlockMask(const Mask& mask, int64_t width)
      : drop(mask.drop), width(width), ld((width + kCols - 1) / kCols * (kCols / 8)),
        data(drop.threshold ? new uint8_t[static_cast<size_t>(kRows * ld)] : nullptr) {}
  Bits of(int64_t m0, int64_t m1) {
    if (data) kernels().draw(drop, m0, m1, width, data.get(), ld);
    return {data.get(), ld};
  }
  const Dropout drop;
  const int64_t width, ld;
  const std::unique_ptr<uint8_t[]> data;
};

constexpr Bits kAll = {nullptr, 0};

// [long, padded(R)] fp32 from a [R, long]; and [R, padded(long)] from its transpose.
struct Panel {
  Panel(Strided src, int64_t rows, int64_t cols, float scale) : ld(padded(cols)), data(rows * ld) {
    kernels().pack(src, rows, cols, scale, data, ld);
  }
  int64_t ld;
  Scratch data;
};

// The row ranges of the tasks: multiples of kRows, at most 16, each worth its partial sums.
struct Tasks {
  explicit Tasks(int64_t rows)
      : M(rows), count(std::clamp<int64_t>(rows / (2 * kRows), 1, 16)), blocks((rows + kRows - 1) / kRows) {}
  int64_t begin(int64_t task) const { return std::min(M, blocks * task / count * kRows); }
  int64_t M, count, blocks;
};

template <class F>
void for_blocks(int64_t begin, int64_t end, F f) {
  for (int64_t m = begin; m < end; m += kRows) f(m, std::min(m + kRows, end));
}

template <class F>
void parallel(int64_t count, F f) {
  if (count == 1) return f(0, 1);
  torch::stable::parallel_for(0, count, 1, f);
}

template <class F>
void parallel_rows(int64_t M, F f) {
  const int64_t blocks = (M + kRows - 1) / kRows;
  if (blocks == 0) return;
  parallel(blocks, [&](int64_t begin, int64_t end) { for_blocks(begin * kRows, std::min(end * kRows, M), f); });
}

// Rows of fp32 [rows, ld] to a contiguous [M, R] tensor, from row m0 on.
void put_rows(const float* s, int64_t ld, int64_t m0, int64_t rows, int64_t R, void* out, Type type) {
  for (int64_t m = 0; m < rows; ++m)
    kernels().from_float(s + m * ld, R, static_cast<char*>(out) + (m0 + m) * R * size_of(type), type);
}

void get_rows(const Tensor& s, int64_t m0, int64_t rows, float* out, int64_t ld) {
  const Type type = type_of(s);
  const int64_t R = s.size(1);
  for (int64_t m = 0; m < rows; ++m)
    kernels().to_float(static_cast<const char*>(s.const_data_ptr()) + (m0 + m) * s.stride(0) * size_of(type), type, R,
                       out + m * ld);
}

// bias + scale · lora_bias in fp32, padded; null where neither is given.
std::unique_ptr<Scratch> start_row(const optional<Tensor>& bias, const optional<Tensor>& lora_bias, int64_t N, float scale) {
  if (!bias && !lora_bias) return nullptr;
  auto row = std::make_unique<Scratch>(padded(N));
  Scratch other(padded(N));
  std::fill(row->data, row->data + padded(N), 0.0f);
  for (const auto& [given, factor] : {std::pair(&bias, 1.0f), std::pair(&lora_bias, scale)}) {
    if (!*given) continue;
    const Tensor t = readable(**given);
    kernels().pack({t.const_data_ptr(), type_of(t), 0, t.stride(0)}, 1, N, factor, other, padded(N));
    for (int64_t n = 0; n < N; ++n) (*row)[n] += other[n];
  }
  return row;
}

// The partial sums [count, rows, ld] of the tasks, added in order, to a contiguous tensor [rows, cols] (or [cols, rows]).
struct Partials {
  Partials(int64_t count, int64_t rows, int64_t cols)
      : count(count), rows(rows), cols(cols), ld(padded(cols)), data(count * rows * ld) {}
  float* clear(int64_t task) {
    float* own = data + task * rows * ld;
    std::fill(own, own + rows * ld, 0.0f);
    return own;
  }
  void finish(const Tensor& out, float factor, bool transposed) {
    float* total = data;
    for (int64_t task = 1; task < count; ++task) {
      const float* part = data + task * rows * ld;
      for (int64_t i = 0; i < rows * ld; ++i) total[i] += part[i];
    }
    const bool direct = has_kernels(out.scalar_type());
    const Tensor target =
        direct ? out : torch::stable::new_empty(out, out.sizes(), std::make_optional(ScalarType::Float));
    Scratch row(std::max(rows, cols));
    const int64_t outer = transposed ? cols : rows, inner = transposed ? rows : cols;
    for (int64_t i = 0; i < outer; ++i) {
      for (int64_t j = 0; j < inner; ++j) row[j] = factor * (transposed ? total[j * ld + i] : total[i * ld + j]);
      put_rows(row, inner, i, 1, inner, target.mutable_data_ptr(), type_of(target));
    }
    if (!direct) {
      Tensor wide = out;
      torch::stable::copy_(wide, target);
    }
  }
  int64_t count, rows, cols, ld;
  Scratch data;
};

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

// ---------------------------------------------------------------------------------------------------------- primitives

void shrink_rows(const Tensor& x, const Panel& panel, const Mask& mask, int64_t R, int64_t m0, int64_t m1, float* s) {
  BlockMask bits(mask, x.size(1));
  kernels().reduce(rows_of(x), m0, m1, x.size(1), bits.of(m0, m1), panel.data, panel.ld, R, s, nullptr, 0, nullptr, 0, nullptr);
}

Tensor lora_shrink(Tensor x, Tensor a, double p, optional<Tensor> seed) {
  const int64_t M = x.size(0), K = x.size(1), R = a.size(0);
  Tensor s = empty_like(x, {M, R});
  const Mask mask = mask_of(p, seed);
  const Tensor readable_a = readable(a);
  const Panel panel(transposed(readable_a), K, R, mask.factor);
  parallel_rows(M, [&](int64_t m0, int64_t m1) {
    Scratch own((m1 - m0) * panel.ld);
    shrink_rows(x, panel, mask, R, m0, m1, own);
    put_rows(own, panel.ld, m0, m1 - m0, R, s.mutable_data_ptr(), type_of(s));
  });
  return s;
}

void expand_into(const Tensor& y, const Tensor& s, const Tensor& b, const float* bias, double scale, bool add) {
  const int64_t R = s.size(1), N = b.size(0), ld = padded(R);
  const Tensor readable_b = readable(b);
  const Panel panel(transposed(readable_b), R, N, static_cast<float>(scale));
  parallel_rows(s.size(0), [&](int64_t m0, int64_t m1) {
    Scratch own((m1 - m0) * ld);
    get_rows(s, m0, m1 - m0, own, ld);
    kernels().expand(own, ld, m0, m1, R, panel.data, panel.ld, bias, kAll, add, y.mutable_data_ptr(), type_of(y),
                     y.stride(0), N);
  });
}

Tensor lora_expand(Tensor s, Tensor b, optional<Tensor> bias, optional<Tensor> lora_bias, double scale) {
  Tensor y = empty_like(s, {s.size(0), b.size(0)});
  const auto start = start_row(bias, lora_bias, b.size(0), static_cast<float>(scale));
  expand_into(y, s, b, start ? start->data : nullptr, scale, false);
  return y;
}

void lora_expand_add(Tensor y, Tensor s, Tensor b, double scale) { expand_into(y, s, b, nullptr, scale, true); }

std::tuple<Tensor, Tensor, Tensor> lora_grad_b(Tensor dy, Tensor s, Tensor b, double scale, bool need_db, bool need_bias) {
  const int64_t M = dy.size(0), N = dy.size(1), R = b.size(1);
  Tensor ds = empty_like(dy, {M, R}), db = need_db ? empty_like(b, {N, R}) : nothing(b);
  Tensor sums = torch::stable::new_empty(dy, {need_bias ? N : 0}, std::make_optional(ScalarType::Float));
  const Tensor readable_b = readable(b);
  const Panel panel(strided(readable_b), N, R, static_cast<float>(scale));
  const Tasks tasks(M);
  Partials grad(tasks.count, need_db ? R : 0, N), bias(tasks.count, need_bias ? 1 : 0, N);
  parallel(tasks.count, [&](int64_t first, int64_t last) {
    Scratch own(kRows * panel.ld), left(kRows * panel.ld);
    for (int64_t task = first; task < last; ++task) {
      float* db_part = need_db ? grad.clear(task) : nullptr;
      float* bias_part = need_bias ? bias.clear(task) : nullptr;
      for_blocks(tasks.begin(task), tasks.begin(task + 1), [&](int64_t m0, int64_t m1) {
        if (need_db) get_rows(s, m0, m1 - m0, left, panel.ld);
        kernels().reduce(rows_of(dy), m0, m1, N, kAll, panel.data, panel.ld, R, own, left, panel.ld, db_part, grad.ld,
                         bias_part);
        put_rows(own, panel.ld, m0, m1 - m0, R, ds.mutable_data_ptr(), type_of(ds));
      });
    }
  });
  if (need_db) grad.finish(db, static_cast<float>(scale), true);
  if (need_bias) bias.finish(sums, 1.0f, false);
  return {ds, db, sums};
}

std::tuple<Tensor, Tensor> lora_grad_a(Tensor x, Tensor ds, Tensor a, double p, optional<Tensor> seed, bool need_dx,
                                       bool need_da) {
  const int64_t M = ds.size(0), K = a.size(1), R = a.size(0), ld = padded(R);
  Tensor da = need_da ? empty_like(a, {R, K}) : nothing(a), dx = need_dx ? empty_like(ds, {M, K}) : nothing(ds);
  const Mask mask = mask_of(p, seed);
  const Tensor readable_a = readable(a);
  const Panel panel(strided(readable_a), R, K, mask.factor);
  const Tasks tasks(M);
  Partials grad(tasks.count, need_da ? R : 0, K);
  parallel(tasks.count, [&](int64_t first, int64_t last) {
    Scratch left(kRows * ld);
    BlockMask masks(mask, K);
    for (int64_t task = first; task < last; ++task) {
      float* part = need_da ? grad.clear(task) : nullptr;
      for_blocks(tasks.begin(task), tasks.begin(task + 1), [&](int64_t m0, int64_t m1) {
        get_rows(ds, m0, m1 - m0, left, ld);
        const Bits bits = masks.of(m0, m1);
        if (need_da)
          kernels().reduce(rows_of(x), m0, m1, K, bits, nullptr, 0, R, nullptr, left, ld, part, grad.ld, nullptr);
        if (need_dx)
          kernels().expand(left, ld, m0, m1, R, panel.data, panel.ld, nullptr, bits, false, dx.mutable_data_ptr(),
                           type_of(dx), K, K);
      });
    }
  });
  if (need_da) grad.finish(da, mask.factor, false);
  return {da, dx};
}

// --------------------------------------------------------------------------------------------------------- compositions

// s and the rank-R part of y in one visit of each block of rows; then the vendor GEMM adds the base product (beta = 1).
std::tuple<Tensor, Tensor> lora_linear_fwd(Tensor x, Tensor w, Tensor a, Tensor b, optional<Tensor> bias,
                                           optional<Tensor> lora_bias, double scale, double p, optional<Tensor> seed,
                                           std::string) {
  const int64_t M = x.size(0), K = x.size(1), N = w.size(0), R = a.size(0);
  const bool upcast = !native(type_of(x));
  Tensor y = empty_like(x, {M, N}), s = empty_like(x, {M, R});
  Tensor sum = upcast ? torch::stable::new_empty(x, {M, N}, std::make_optional(ScalarType::Float)) : y;
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
  Tensor sums = torch::stable::new_empty(dy, {need_bias ? N : 0}, std::make_optional(ScalarType::Float));
  Tensor sum = need_dx && upcast ? torch::stable::new_empty(dy, {M, K}, std::make_optional(ScalarType::Float)) : dx;
  const Mask mask = mask_of(p, seed);
  const Tensor readable_a = readable(a), readable_b = readable(b);
  const Panel down(strided(readable_a), need_dx ? R : 0, K, mask.factor);
  const Panel up(strided(readable_b), N, R, static_cast<float>(scale));
  const Tasks tasks(M);
  Partials grad_a(tasks.count, need_da ? R : 0, K), grad_b(tasks.count, need_db ? R : 0, N);
  Partials bias(tasks.count, need_bias ? 1 : 0, N);
  const bool need_ds = need_dx || need_da;
  parallel(tasks.count, [&](int64_t first, int64_t last) {
    Scratch ds(kRows * ld), left(kRows * ld);
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

STABLE_TORCH_LIBRARY(fastpeft_cpp, m) {
  m.def("lora_shrink(Tensor x, Tensor a, float p, Tensor? seed) -> Tensor");
  m.def("lora_expand(Tensor s, Tensor b, Tensor? bias, Tensor? lora_bias, float scale) -> Tensor");
  m.def("lora_expand_add(Tensor(a!) y, Tensor s, Tensor b, float scale) -> ()");
  m.def("lora_grad_b(Tensor dy, Tensor s, Tensor b, float scale, bool need_db, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("lora_grad_a(Tensor x, Tensor ds, Tensor a, float p, Tensor? seed, bool need_dx, bool need_da) -> (Tensor, Tensor)");
  m.def("lora_linear_fwd(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor? lora_bias, float scale, float p, "
        "Tensor? seed, str strategy) -> (Tensor, Tensor)");
  m.def("lora_linear_bwd(Tensor dy, Tensor x, Tensor w, Tensor a, Tensor b, Tensor s, float scale, float p, Tensor? seed, "
        "str strategy, bool need_dx, bool need_da, bool need_db, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) {
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("lora_expand", TORCH_BOX(&lora_expand));
  m.impl("lora_expand_add", TORCH_BOX(&lora_expand_add));
  m.impl("lora_grad_b", TORCH_BOX(&lora_grad_b));
  m.impl("lora_grad_a", TORCH_BOX(&lora_grad_a));
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&lora_linear_bwd));
}

}  // namespace fastpeft
