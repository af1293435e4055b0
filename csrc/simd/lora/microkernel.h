// The micro-kernel of the LoRA products in fp32: C[MR][NV vectors] += A · B, with A broadcast from thin or strided
// storage and B read as whole vectors of contiguous rows.
#pragma once
#include "simd/vector.h"

namespace {

// Loops over the sums of a tile are unrolled by pragma: a runtime index would put all sums on the stack.

template <int MR, int NV>
inline void tile(const float* a, int64_t am, int64_t ak, const float* b, int64_t bk, int64_t k, vf (&acc)[MR][NV]) {
  // One pointer for three rows, as far as scaled indices reach: twelve pointers would not stay in registers.
  const float* three[(MR + 2) / 3];
  for (int m = 0; m < MR; m += 3) three[m / 3] = a + m * am;
  for (int64_t i = 0; i < k; ++i) {
    vf row[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) row[v] = load<vf>(b + i * bk + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const vf x = splat(three[m / 3][m % 3 * am]);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[m][v] += x * row[v];
    }
    for (int m = 0; m < MR; m += 3) three[m / 3] += ak;
  }
}

// The number of terms that are summed before the sum is added to the total.
constexpr int64_t kShortSum = 32;

// c[m, n] = start[n] + scale * sum_k a[m, k] b[k, n] for MR rows and NV vectors; with ADD, c += scale * the sum. A long
// sum is made of short ones, so that it has the rounding error of 32 terms, not of thousands.
template <int MR, int NV, bool ADD>
inline void block(const float* a, int64_t am, int64_t ak, const float* b, int64_t bk, int64_t k, const float* start,
                  float scale, float* c, int64_t ldc) {
  vf acc[MR][NV], first[NV] = {};
  clear(acc);
  tile<MR, NV>(a, am, ak, b, bk, k, acc);
  if (start)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) first[v] = load<vf>(start + v * kLanes);
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      float* out = c + m * ldc + v * kLanes;
      store(out, scale * acc[m][v] + (ADD ? load<vf>(out) : first[v]));
    }
}

// All rows: groups of MR, then of 4, 2 and 1.
template <int MR, int NV, bool ADD>
inline void rows_of(const float* a, int64_t am, int64_t ak, int64_t rows, const float* b, int64_t bk, int64_t k,
                    const float* start, float scale, float* c, int64_t ldc) {
  int64_t m = 0;
  for (; m + MR <= rows; m += MR) block<MR, NV, ADD>(a + m * am, am, ak, b, bk, k, start, scale, c + m * ldc, ldc);
  if constexpr (MR > 4)
    for (; m + 4 <= rows; m += 4) block<4, NV, ADD>(a + m * am, am, ak, b, bk, k, start, scale, c + m * ldc, ldc);
  if constexpr (MR > 2)
    for (; m + 2 <= rows; m += 2) block<2, NV, ADD>(a + m * am, am, ak, b, bk, k, start, scale, c + m * ldc, ldc);
  for (; m < rows; ++m) block<1, NV, ADD>(a + m * am, am, ak, b, bk, k, start, scale, c + m * ldc, ldc);
}

}  // namespace
