// pack of simd/kernels.h for the products in fp32.
#pragma once
#include "simd/convert.h"
#if FP_ISA >= 2
#include "simd/transpose.h"
#endif

namespace {

// out[i * ld + j] = src[i, j], whose columns are contiguous.
template <Type T>
void transpose_to(const Strided& src, int64_t rows, int64_t cols, float* out, int64_t ld) {
#if FP_ISA >= 2
  for (int64_t j = 0; j < cols; j += kLanes)
    for (int64_t i = 0; i < rows; i += kLanes) {
      __m512 block[kLanes];
      for (int t = 0; t < kLanes; ++t)
        block[t] =
            reinterpret_cast<__m512>(j + t < cols ? load_some<T>(src.data, (j + t) * src.col + i, rows - i) : vf{});
      transpose(block);
      for (int64_t t = 0; t < smaller(kLanes, rows - i); ++t)
        store_some<Type::f32>(out, (i + t) * ld + j, reinterpret_cast<vf>(block[t]), ld - j);
    }
#else
  constexpr int64_t kBlock = 64;  // rows that stay in an L1 cache
  for (int64_t i = 0; i < rows; i += kBlock)
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t k = i; k < smaller(i + kBlock, rows); ++k)
        out[k * ld + j] = scalar_to_float(src.data, T, k + j * src.col);
#endif
}

// out[i * ld + j] = src[i, j] in fp32, zero from cols up to ld.
template <Type T>
void pack_f32(const Strided& src, int64_t rows, int64_t cols, float* out, int64_t ld) {
  if (src.col == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; j += kLanes)
        store_some<Type::f32>(out, i * ld + j, load_some<T>(src.data, i * src.row + j, cols - j), ld - j);
  } else if (src.row == 1) {
    transpose_to<T>(src, rows, cols, out, ld);
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) out[i * ld + j] = scalar_to_float(src.data, T, i * src.row + j * src.col);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = cols; j < ld; ++j) out[i * ld + j] = 0.0f;
}

}  // namespace
