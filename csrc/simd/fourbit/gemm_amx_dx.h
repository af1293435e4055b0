// dy w of bf16 rows with a 4-bit weight on tile registers: dy in left tiles, pairs of rows of W decoded by planes
// (planes.h) to right ones.
#pragma once
#include "simd/fourbit/gemm_amx.h"

namespace {

// Left tiles of rows of dy, [tiles of 16 rows, steps of 32 columns, 16, 32], zero past the end.
void amx_pack_backward(const Rows& dy, int64_t m0, int64_t m1, int64_t N, int64_t first, int64_t last, uint32_t* out) {
  const uint16_t* data = static_cast<const uint16_t*>(dy.data);
  const int64_t steps = (N + 31) / 32, end = smaller(N, last * kChunk);
  for (int64_t m = m0; m < m0 + tiles_of(m1 - m0) * kTileRows; ++m)
    for (int64_t n = first * kChunk; n < end; n += 32) {
      const int64_t tile = (m - m0) / kTileRows * steps + n / 32;
      _mm512_store_si512(out + (tile * kTileRows + (m - m0) % kTileRows) * kTilePairs,
                         _mm512_maskz_loadu_epi16(m < m1 ? first_of_32(N - n) : 0u, data + m * dy.stride + n));
    }
}

// As LeftAhead: 4 steps of 32 rows of W at a time to right tiles, one of each plane.
struct RightAhead {
  static constexpr int64_t kDepth = 4;
  explicit RightAhead(const StripPart& part) : part(part) { fill(kDepth * kTileRows); }
  // Decodes `count` more pairs of rows; past the end, zero.
  void fill(int64_t count) {
    for (; count > 0; --count, ++pair) {
      __m512i planes[kPlanes];
      part.decode(pair, planes);
      const int64_t step = pair / kTileRows;
      for (int p = 0; p < kPlanes; ++p)
        _mm512_store_si512(decoded[step / kDepth % 2][step % kDepth][p][pair % kTileRows], planes[p]);
    }
  }
  const StripPart part;
  int64_t pair = 0;
  alignas(64) uint32_t decoded[2][kDepth][kPlanes][kTileRows][kTilePairs];
};

// dx[:, a strip] = dy w, 64 columns at a time: a tile for each plane in 0 to 3. dy goes through 4, W through 5.
void amx_backward(const uint32_t* dy, int64_t M, int64_t N, int64_t K, const Packed& w, const float* absmax, int64_t k0,
                  int64_t k1, float* scratch, void* dx, Type type, int64_t ldx) {
  constexpr int64_t kDepth = RightAhead::kDepth;
  const int64_t steps = (N + 31) / 32, count = tiles_of(M), pairs_per_step = kTileRows / count + 1;
  float* const sums = scratch + strip_floats(N);
  const Strip strip(w, absmax, N, K, k0, k1, scratch);
  const Tiles tiles(full_tiles());
  for (int64_t i = 0; i < strip.parts; ++i) {
    RightAhead right(StripPart(strip, w.type, i));
    for (int64_t s0 = 0; s0 < steps; s0 += kDepth)
      for (int64_t t = 0; t < count; ++t) {
        const bool spill = count > 1, last = s0 + kDepth >= steps;
        float* tile_sums = sums + t * 4 * kTileFloats;
        if (spill || !s0) sums_start(s0 ? tile_sums : nullptr);
        for (int64_t s = 0; s < smaller(kDepth, steps - s0); ++s) {
          const auto& planes = right.decoded[s0 / kDepth % 2][s];
          tile_load<4>(dy + (t * steps + s0 + s) * kTileFloats, 64);
          tile_load<5>(planes[0], 64);
          tile_dot<0, 4, 5>();
          tile_load<5>(planes[1], 64);
          tile_dot<1, 4, 5>();
          tile_load<5>(planes[2], 64);
          tile_dot<2, 4, 5>();
          tile_load<5>(planes[3], 64);
          tile_dot<3, 4, 5>();
          right.fill(smaller(pairs_per_step, (s0 + 2 * kDepth) * kTileRows - right.pair));
        }
        if (spill || last) sums_store(tile_sums);
      }
    for (int64_t m = 0; m < M; ++m) {
      const float* from = sums + m / kTileRows * 4 * kTileFloats + m % kTileRows * kTilePairs;
      store_planes(from, kTileFloats, dx, type, m * ldx + k0 + i * kStripPart);
    }
  }
}

// W is decoded again for every group of rows, so that with enough of them panels are faster.
constexpr FourBitGemm kGemm = {
    /*group_rows=*/kAmxGroupRows,
    /*min_block=*/64,
    /*min_block_backward=*/64,
    /*max_rows=*/512,
    /*max_rows_backward=*/256,
    amx_weight_rows,
    amx_scratch,
    amx_pack_forward,
    amx_forward,
    amx_pack_backward,
    amx_backward,
};

}  // namespace
