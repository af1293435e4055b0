// The little that the operators need of libtorch, through its stable ABI.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>

#include "cpu_kernels.h"

namespace fastpeft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// fp32 scratch, aligned to a vector and not initialised; a tiny layer's fits in place, and asks no allocator.
struct Scratch {
  explicit Scratch(int64_t n)
      : data(n <= kInPlace ? in_place : static_cast<float*>(::operator new[](static_cast<size_t>(n) * sizeof(float), kAlign))) {}
  ~Scratch() {
    if (data != in_place) ::operator delete[](data, kAlign);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator float*() const { return data; }

 private:
  static constexpr int64_t kInPlace = 256;
  static constexpr std::align_val_t kAlign{64};
  alignas(64) float in_place[kInPlace];

 public:
  float* const data;
};

inline bool has_kernels(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline Type type_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(has_kernels(type), "fastpeft: a tensor must be float32, bfloat16 or float16");
  return type == ScalarType::Float ? Type::f32 : type == ScalarType::BFloat16 ? Type::bf16 : Type::f16;
}

inline int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// A thin parameter in a type that the kernels read; fp64 and other floats go through fp32.
inline Tensor readable(const Tensor& t) {
  return has_kernels(t.scalar_type()) ? t : torch::stable::to(t, ScalarType::Float);
}

inline Strided strided(const Tensor& t) {
  return {t.const_data_ptr(), type_of(t), t.stride(0), t.stride(1)};
}
inline Strided transposed(const Tensor& t) {
  return {t.const_data_ptr(), type_of(t), t.stride(1), t.stride(0)};
}
inline Rows rows_of(const Tensor& t) {
  return {t.const_data_ptr(), type_of(t), t.stride(0), t.size(0)};
}

// Straight to the allocator: the dispatcher's new_empty costs a tiny layer more than its arithmetic.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(sizes.begin()[1], 1);
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                         torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor empty_like(const Tensor& t, std::initializer_list<int64_t> sizes) { return empty(sizes, t.scalar_type()); }
inline Tensor nothing(const Tensor& t) { return empty_like(t, {0}); }

inline Tensor transpose(const Tensor& t) {
  const int64_t sizes[] = {t.size(1), t.size(0)}, strides[] = {t.stride(1), t.stride(0)};
  AtenTensorHandle view;  // its offset is counted from the tensor's own
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &view));
  return Tensor(view);
}

// y = beta · y + a b: the vendor GEMM.
inline void gemm(const Tensor& y, const Tensor& a, const Tensor& b, double beta = 1.0) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), y.get(), a.get(), b.get(), beta, 1.0));
}

}  // namespace fastpeft
