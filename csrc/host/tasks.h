// Tasks on torch's thread pool, and conversions between rows of fp32 and tensors.
//
// Work is cut into tasks by shape alone and partial sums are added in task order, so the bytes that our kernels compute
// do not depend on the number of threads. The vendor GEMM's may, as it splits its sums itself.
#pragma once
#include <algorithm>

#include "host/tensor.h"

namespace fastpeft {

// Row ranges for tasks: whole multiples of kRows, at most 16 of them, each large enough to be worth its own partial
// sums.
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

// fp32 [rows, ld] to rows m0 and on of a contiguous [M, R] tensor.
inline void store_rows(const float* s, int64_t ld, int64_t m0, int64_t rows, int64_t R, void* out, Type type) {
  for (int64_t m = 0; m < rows; ++m)
    kernels().from_float(s + m * ld, R, static_cast<char*>(out) + (m0 + m) * R * size_of(type), type);
}

inline void load_rows(const Tensor& s, int64_t m0, int64_t rows, float* out, int64_t ld) {
  const Type type = type_of(s);
  const int64_t R = s.size(1);
  for (int64_t m = 0; m < rows; ++m)
    kernels().to_float(static_cast<const char*>(s.const_data_ptr()) + (m0 + m) * s.stride(0) * size_of(type), type, R,
                       out + m * ld);
}

}  // namespace fastpeft
