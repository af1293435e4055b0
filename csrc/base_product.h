// What the base products share on a CPU: which GEMMs are fast, the way through fp32, and the order of GEMM and adapter.
#pragma once
#include "tasks.h"

namespace fastpeft {

// Whether torch multiplies matrices of this type at the speed of the processor.
bool native(Type type);

inline Temporary to_f32(const Tensor& t) {  // [rows, cols], last dimension contiguous
  const int64_t cols = t.size(1);
  Temporary out(t.size(0), cols, ScalarType::Float);
  float* data = static_cast<float*>(out.tensor.mutable_data_ptr());
  parallel_rows(t.size(0), [&](int64_t m0, int64_t m1) { get_rows(t, m0, m1 - m0, data + m0 * cols, cols); });
  return out;
}

inline void from_f32(const Tensor& src, const Tensor& out) {
  const float* data = static_cast<const float*>(src.const_data_ptr());
  const int64_t cols = src.size(1);
  parallel_rows(src.size(0), [&](int64_t m0, int64_t m1) {
    put_rows(data + m0 * cols, cols, m0, m1 - m0, cols, out.mutable_data_ptr(), type_of(out));
  });
}

inline Tensor rows(const Tensor& t, int64_t m, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(t), 0, m, count);
}

inline Tensor columns(const Tensor& t, int64_t n, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(t), 1, n, count);
}

// Whether the vendor GEMM goes first, and the adapter adds to it. In bf16 that is the faster order (lora_adapter.h); in fp32 the
// exact one for few rows or columns, where the vendor adds every single term of a dot product to what y holds already.
constexpr int64_t kFew = 16;
inline bool is_base_first(Type type, int64_t rows, int64_t columns) { return native(type) && (type != Type::f32 || std::min(rows, columns) < kFew); }

// The base product in fp32, panel by panel of W: torch's own bf16 and fp16 products on a processor without such
// instructions run at 1 to 12 GFLOP/s, the fp32 one at its peak.
constexpr int64_t kUpcastRows = 512;

template <class F>
void upcast_panels(const Tensor& w, F f) {
  for (int64_t n = 0; n < w.size(0); n += kUpcastRows) {
    const int64_t count = std::min(kUpcastRows, w.size(0) - n);
    Tensor panel = rows(w, n, count);
    if (panel.stride(1) != 1) panel = torch::stable::contiguous(panel);
    f(to_f32(panel), n, count);
  }
}

// y [M, N] = x wᵀ, and what ``adapter(sum, add)`` writes to the sum, or adds to it.
template <class F>
Tensor product_with(const Tensor& x, const Tensor& w, F adapter) {
  const int64_t M = x.size(0), N = w.size(0);
  const Type type = type_of(x);
  const bool base_first = is_base_first(type, M, N);
  const Tensor y = empty_like(x, {M, N});
  optional<Temporary> wide;
  const Tensor& sum = native(type) ? y : wide.emplace(M, N, ScalarType::Float).tensor;
  if (base_first) gemm(y, x, transpose(w), 0.0);
  adapter(sum, base_first);
  if (base_first) return y;
  if (native(type)) {
    gemm(y, x, transpose(w));
  } else if (M) {
    const Temporary x32 = to_f32(x);
    upcast_panels(w, [&](const Tensor& w32, int64_t n, int64_t count) { gemm(columns(sum, n, count), x32, transpose(w32)); });
    from_f32(sum, y);
  }
  return y;
}

// dx [M, K] = dy w, and what ``adapter(sum, add)`` writes to the sum, or adds to it.
template <class F>
Tensor product_dx_with(const Tensor& dy, const Tensor& w, F adapter) {
  const int64_t M = dy.size(0), K = w.size(1);
  const Type type = type_of(dy);
  const bool base_first = is_base_first(type, M, K);
  const Tensor dx = empty_like(dy, {M, K});
  optional<Temporary> wide;
  const Tensor& sum = native(type) ? dx : wide.emplace(M, K, ScalarType::Float).tensor;
  if (base_first) gemm(dx, dy, w, 0.0);
  adapter(sum, base_first);
  if (base_first) return dx;
  if (native(type)) {
    gemm(dx, dy, w);
  } else if (M) {
    const Temporary dy32 = to_f32(dy);
    upcast_panels(w, [&](const Tensor& w32, int64_t n, int64_t count) { gemm(sum, columns(dy32, n, count), w32); });
    from_f32(sum, dx);
  }
  return dx;
}

}  // namespace fastpeft
