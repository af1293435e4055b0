// The micro-kernel of the LoRA products in fp32: C[MR][NV vectors] += A · B, with A broadcast from thin or strided storage and
// B read as whole vectors of contiguous rows; for one instruction set.
#pragma once
#include "simd/vector.h"

namespace {

// Loops over a tile's sums are unrolled by word: where one is not, its index puts all sums on the stack.

template <int MR, int NV>
inline void tile(const float* a, int64_t am, int64_t ak, const float* b, int64_t bk, int64_t k, vf (&acc)[MR][NV]) {
  // One pointer to three rows, the reach of an address with a scaled index: twelve would not stay in registers.
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

// The terms that one sum runs over before it is added to the whole.
constexpr int64_t kShortSum = 32;

// c[m, n] = start[n] + scale * sum_k a[m, k] b[k, n] for MR rows and NV vectors; ADD: c += scale * the sum, so that a long
// sum is one of short sums: the rounding error of 32 terms and not of thousands.
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

// All rows at one width: the full row group, then groups of 4, 2 and 1.
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
