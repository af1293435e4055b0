// The vendor GEMM on a CPU: the types that it multiplies fast, and the detour through fp32 for the others.
#pragma once
#include "host/tasks.h"

namespace fastpeft {

// Whether torch multiplies matrices of this type at the processor's full speed.
bool native(Type type);
// Called once on import, with what this torch and this processor support.
void set_native_gemm(bool bf16, bool f16);

inline Temporary to_f32(const Tensor& t) {  // [rows, cols], last dimension contiguous
  const int64_t cols = t.size(1);
  Temporary out(t.size(0), cols, ScalarType::Float);
  float* data = static_cast<float*>(out.tensor.mutable_data_ptr());
  parallel_rows(t.size(0), [&](int64_t m0, int64_t m1) { load_rows(t, m0, m1 - m0, data + m0 * cols, cols); });
  return out;
}

inline void from_f32(const Tensor& src, const Tensor& out) {
  const float* data = static_cast<const float*>(src.const_data_ptr());
  const int64_t cols = src.size(1);
  parallel_rows(src.size(0), [&](int64_t m0, int64_t m1) {
    store_rows(data + m0 * cols, cols, m0, m1 - m0, cols, out.mutable_data_ptr(), type_of(out));
  });
}

inline Tensor rows(const Tensor& t, int64_t m, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(t), 0, m, count);
}

inline Tensor columns(const Tensor& t, int64_t n, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(t), 1, n, count);
}

// Calls f(rows [n, n + count) of w in fp32, n, count) panel by panel. On a processor without bf16 or fp16 instructions
// torch's products of those types run at 1 to 12 GFLOP/s, its fp32 product at the peak.
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

}  // namespace fastpeft
