// The base product of an adapted layer on a CPU, and the order of GEMM and adapter.
#pragma once
#include "host/gemm.h"

namespace fastpeft {

// Whether the vendor GEMM goes first and the adapter adds to its result. In bf16 this is the faster order
// (lora_adapter.h). In fp32 it is the accurate one for few rows or columns: there the vendor adds every single term of
// a dot product to what y already holds.
constexpr int64_t kSkinny = 16;
inline bool is_base_first(Type type, int64_t rows, int64_t columns) {
  return native(type) && (type != Type::f32 || std::min(rows, columns) < kSkinny);
}

// y [M, N] = x wᵀ plus the adapter's share: `adapter(sum, add)` writes it to `sum`, or adds it.
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
    upcast_panels(
        w, [&](const Tensor& w32, int64_t n, int64_t count) { gemm(columns(sum, n, count), x32, transpose(w32)); });
    from_f32(sum, y);
  }
  return y;
}

// dx [M, K] = dy w plus the adapter's share, as above.
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
