// dots of simd/kernels.h: products of a thin parameter, read in place, with a few rows of x. Packing it first would
// cost more.
#pragma once
#include "simd/convert.h"

namespace {

// The number of vectors that are summed before the sum is added to the total: a lane has the rounding error of 32
// terms.
constexpr int64_t kShortDot = 32;

// NR rows of a (1 or 4) by one row of x.
template <Type T, int NR>
inline void dot_rows(const void* a, int64_t base, int64_t stride, int64_t width, const float* x, float* out) {
  vf sum[NR][1];
  clear(sum);
  for (int64_t k0 = 0; k0 < width; k0 += kShortDot * kLanes) {
    const int64_t end = smaller(k0 + kShortDot * kLanes, width);
    vf part[NR][1];
    clear(part);
    for (int64_t k = k0; k < end; k += kLanes) {
      const vf of_x = load<vf>(x + k);
#pragma GCC unroll 4
      for (int i = 0; i < NR; ++i) part[i][0] += load_some<T>(a, base + i * stride + k, width - k) * of_x;
    }
#pragma GCC unroll 4
    for (int i = 0; i < NR; ++i) sum[i][0] += part[i][0];
  }
  if constexpr (NR == 4) totals({sum[0][0], sum[1][0], sum[2][0], sum[3][0]}, out);
  else *out = total(sum[0][0]);
}

template <Type T>
void dots_as(const Rows& a, int64_t width, const float* x, int64_t ldx, int64_t M, float* out, int64_t ldo) {
  int64_t i = 0;  // the outer loop runs over rows of a, which are read from memory once
  for (; i + 4 <= a.count; i += 4)
    for (int64_t m = 0; m < M; ++m)
      dot_rows<T, 4>(a.data, i * a.stride, a.stride, width, x + m * ldx, out + m * ldo + i);
  for (; i < a.count; ++i)
    for (int64_t m = 0; m < M; ++m)
      dot_rows<T, 1>(a.data, i * a.stride, a.stride, width, x + m * ldx, out + m * ldo + i);
}

void dots(Rows a, int64_t width, const float* x, int64_t ldx, int64_t M, float* out, int64_t ldo) {
  auto as = a.type == Type::f32 ? dots_as<Type::f32> : a.type == Type::bf16 ? dots_as<Type::bf16> : dots_as<Type::f16>;
  as(a, width, x, ldx, M, out, ldo);
}

}  // namespace
