// What the base products of lora_linear and linear4bit share on a CPU: which GEMMs are fast, and the way through fp32.
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

}  // namespace fastpeft
