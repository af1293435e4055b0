// Products of the rows of a thin parameter, as they lie, with a few rows of x: where packing it first would cost more.
#pragma once
#include "simd.h"

namespace {

using fastpeft::Rows;

// The vectors that one sum runs over before it is added to the whole: a lane's rounding error is that of 32 terms.
constexpr int64_t kShortDot = 32;

template <Type T, int MR>
inline void dot_rows(const void* a, int64_t base, int64_t width, const float* x, int64_t ldx, float* out, int64_t ldo) {
  vf sum[MR][1];
  clear(sum);
  for (int64_t k0 = 0; k0 < width; k0 += kShortDot * kLanes) {
    const int64_t end = k0 + kShortDot * kLanes < width ? k0 + kShortDot * kLanes : width;
    vf part[MR][1];
    clear(part);
    for (int64_t k = k0; k < end; k += kLanes) {
      const vf row = load_some<T>(a, base + k, width - k);
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) part[m][0] += row * load<vf>(x + m * ldx + k);
    }
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) sum[m][0] += part[m][0];
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) out[m * ldo] = total(sum[m][0]);
}

template <Type T>
void dots_as(const Rows& a, int64_t width, const float* x, int64_t ldx, int64_t M, float* out, int64_t ldo) {
  for (int64_t i = 0; i < a.count; ++i) {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) dot_rows<T, 4>(a.data, i * a.stride, width, x + m * ldx, ldx, out + m * ldo + i, ldo);
    for (; m < M; ++m) dot_rows<T, 1>(a.data, i * a.stride, width, x + m * ldx, ldx, out + m * ldo + i, ldo);
  }
}

void dots(Rows a, int64_t width, const float* x, int64_t ldx, int64_t M, float* out, int64_t ldo) {
  auto as = a.type == Type::f32 ? dots_as<Type::f32> : a.type == Type::bf16 ? dots_as<Type::bf16> : dots_as<Type::f16>;
  as(a, width, x, ldx, M, out, ldo);
}

}  // namespace
