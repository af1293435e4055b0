// What the operators need of libtorch, through its stable ABI.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "host/workspace.h"
#include "simd/kernels.h"

namespace fastpeft {

using std::optional;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// fp32 scratch memory, aligned to a vector, not initialised. A tiny layer's fits in place and needs no allocator.
struct Scratch {
  explicit Scratch(int64_t n)
      : buffer(n <= kInPlace ? 0 : static_cast<size_t>(n) * sizeof(float)),
        data(buffer.data ? static_cast<float*>(buffer.data) : in_place) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator float*() const { return data; }

 private:
  static constexpr int64_t kInPlace = 256;
  alignas(64) float in_place[kInPlace];
  Buffer buffer;

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

// A thin parameter in a type that the kernels read; fp64 and other floats are converted to fp32.
inline Tensor readable(const Tensor& t) {
  return has_kernels(t.scalar_type()) ? t : torch::stable::to(t, ScalarType::Float);
}

inline Strided strided(const Tensor& t) { return {t.const_data_ptr(), type_of(t), t.stride(0), t.stride(1)}; }
inline Strided transposed(const Tensor& t) { return {t.const_data_ptr(), type_of(t), t.stride(1), t.stride(0)}; }
inline Rows rows_of(const Tensor& t) { return {t.const_data_ptr(), type_of(t), t.stride(0), t.size(0)}; }

inline int32_t dtype_code(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

// Calls the allocator directly: the dispatcher's new_empty costs a tiny layer more than its arithmetic.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(sizes.begin()[1], 1);
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                  dtype_code(type), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// A matrix that lives for one call. A large one lies in a kept buffer that is given back at the end: nothing may hold
// its tensor longer.
struct Temporary {
  Temporary(int64_t rows, int64_t cols, ScalarType type)
      : buffer(bytes(rows, cols, type) < kMinKept ? 0 : bytes(rows, cols, type)),
        tensor(made(buffer.data, rows, cols, type)) {}
  operator const Tensor&() const { return tensor; }

 private:
  static size_t bytes(int64_t rows, int64_t cols, ScalarType type) {
    return static_cast<size_t>(rows * cols) * (type == ScalarType::Float ? 4 : 2);
  }
  static Tensor made(void* data, int64_t rows, int64_t cols, ScalarType type) {
    if (!data) return empty({rows, cols}, type);
    const int64_t sizes[] = {rows, cols}, strides[] = {cols, 1};
    AtenTensorHandle view;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob_v2(data, 2, sizes, strides, 0, dtype_code(type),
                                                                 aoti_torch_device_type_cpu(), 0, &view,
                                                                 aoti_torch_layout_strided(), nullptr, 0));
    return Tensor(view);
  }

  Buffer buffer;

 public:
  const Tensor tensor;
};

inline Tensor empty_like(const Tensor& t, std::initializer_list<int64_t> sizes) {
  return empty(sizes, t.scalar_type());
}
inline Tensor nothing(const Tensor& t) { return empty_like(t, {0}); }

inline Tensor transpose(const Tensor& t) {
  const int64_t sizes[] = {t.size(1), t.size(0)}, strides[] = {t.stride(1), t.stride(0)};
  AtenTensorHandle view;  // the offset is relative to the tensor's
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &view));
  return Tensor(view);
}

// y = beta · y + a b: the vendor GEMM.
inline void gemm(const Tensor& y, const Tensor& a, const Tensor& b, double beta = 1.0) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), y.get(), a.get(), b.get(), beta, 1.0));
}

}  // namespace fastpeft
