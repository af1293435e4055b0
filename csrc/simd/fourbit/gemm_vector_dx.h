// dy w of bf16 rows with a 4-bit weight on vectors: 64 columns of W decoded, 128 of its rows at a time, into an L1
// cache for every row of dy.
//
// The words of two rows of W are interleaved before they are decoded: a lane of a plane is then a pair of rows, which
// is what a product sums, and absmax, which differs between the rows of a sum, is in the table (planes.h).
#pragma once
#include "simd/fourbit/gemm_vector.h"
#include "simd/fourbit/planes.h"

namespace {

// [chunks of rows of W, parts of rows of dy, pairs of rows, rows of a part], zero past the end.
void vector_pack_backward(const Rows& dy, int64_t m0, int64_t m1, int64_t N, int64_t first, int64_t last,
                          uint32_t* out) {
  pack_steps(dy, m0, m1, N, first, last, out, [](__m512i&) {});
}

// totals[row][plane] += dy w for some rows of dy and `count` pairs of rows of W.
template <int Rows>
inline void backward_tile(const uint32_t* dy, const __m512i (*w)[kPlanes], int64_t count, float* totals) {
  vf sum[Rows][kPlanes];
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
    for (int p = 0; p < kPlanes; ++p) sum[m][p] = load<vf>(totals + (m * kPlanes + p) * kLanes);
  for (int64_t s = 0; s < count; ++s, ++w, dy += Rows)
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) {
      const vu pair = vu{} + dy[m];
      for (int p = 0; p < kPlanes; ++p) sum[m][p] = dot(sum[m][p], reinterpret_cast<vu>((*w)[p]), pair);
    }
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
    for (int p = 0; p < kPlanes; ++p) store(totals + (m * kPlanes + p) * kLanes, sum[m][p]);
}

constexpr decltype(&backward_tile<1>) kBackwardTiles[kTileRowsOfX] = {
    backward_tile<1>, backward_tile<2>, backward_tile<3>, backward_tile<4>, backward_tile<5>, backward_tile<6>};

void vector_backward(const uint32_t* dy, int64_t M, int64_t N, int64_t K, const Packed& w, const float* absmax,
                     int64_t k0, int64_t k1, float* scratch, void* dx, Type type, int64_t ldx) {
  float* const totals = scratch + strip_floats(N);
  const Strip strip(w, absmax, N, K, k0, k1, scratch);
  __m512i decoded[kChunkSteps][kPlanes];
  for (int64_t i = 0; i < strip.parts; ++i) {
    const StripPart part(strip, w.type, i);
    std::memset(totals, 0, static_cast<size_t>(M * kStripPart) * sizeof(float));
    for (int64_t n0 = 0; n0 < N; n0 += kChunk) {
      const int64_t count = (smaller(kChunk, N - n0) + 1) / 2;
      for (int64_t pair = 0; pair < count; ++pair) part.decode(n0 / 2 + pair, decoded[pair]);
      for_parts(M, [&](int64_t m, int64_t rows) {
        kBackwardTiles[rows - 1](dy + (n0 / kChunk * M + m) * kChunkSteps, decoded, count, totals + m * kStripPart);
      });
    }
    for (int64_t m = 0; m < M; ++m)
      store_planes(totals + m * kStripPart, kLanes, dx, type, m * ldx + k0 + i * kStripPart);
  }
}

constexpr FourBitGemm kGemm = {
    /*group_rows=*/256,
    /*min_block=*/32,
    /*min_block_backward=*/64,
    /*max_rows=*/INT64_MAX,
    /*max_rows_backward=*/INT64_MAX,
    vector_weight_rows,
    vector_scratch,
    vector_pack_forward,
    vector_forward,
    vector_pack_backward,
    vector_backward,
};

}  // namespace
