// The vendor GEMM on a CPU: which types it multiplies fast, and the way through fp32 for those that it does not.
#pragma once
#include "host/tasks.h"

namespace fastpeft {

// Whether torch multiplies matrices of this type at the speed of the processor.
bool native(Type type);
// Set once on import, of what this torch and this processor have.
void set_native_gemm(bool bf16, bool f16);

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

}  // namespace fastpeft
