// dy w of bf16 rows with a 4-bit weight as it is stored, on tile registers: see planes.h.
#pragma once
#include "simd/fourbit/gemm_amx_common.h"

namespace {

// Left tiles of rows of dy, [tiles of 16 rows, steps of 32 columns, 16, 32], zero past the end.
void arrange_backward(const Rows& dy, int64_t m0, int64_t m1, int64_t N, uint32_t* out) {
  const uint16_t* data = static_cast<const uint16_t*>(dy.data);
  for (int64_t m = m0; m < m0 + tiles_of(m1 - m0) * kTileRows; ++m)
    for (int64_t n = 0, step = 0; n < N; n += 32, ++step) {
      const int64_t tile = (m - m0) / kTileRows * ((N + 31) / 32) + step;
      _mm512_store_si512(out + (tile * kTileRows + (m - m0) % kTileRows) * kTilePairs,
                         _mm512_maskz_loadu_epi16(m < m1 ? first_of_32(N - n) : 0u, data + m * dy.stride + n));
    }
}

// As LeftAhead: 4 steps of 32 rows at a time to right tiles, one of each plane.
struct RightAhead {
  static constexpr int64_t kDepth = 4;
  RightAhead(const ColumnsOfRows& w, FourBit type, int64_t part)
      : decoder(type, 0xaaaaaaaau), packed(w.packed + part * w.N * 32), scales(w.scales + part * w.N), N(w.N) {
    fill(kDepth * kTileRows);
  }
  // `count` more pairs of rows; past the end, zero.
  void fill(int64_t count) {
    const __m512i turn = _mm512_load_si512(kPairsOfRows.at);
    for (; count > 0; --count, ++pair) {
      __m512i planes[kPlanes] = {};
      const int64_t n = 2 * pair;
      if (n + 1 < N) decoder.planes(_mm512_permutexvar_epi16(turn, _mm512_loadu_si512(packed + n * 32)), scales[n], scales[n + 1], planes);
      else if (n < N) decoder.planes(_mm512_permutexvar_epi16(turn, _mm512_maskz_loadu_epi64(0x0f, packed + n * 32)), scales[n], 0.0f, planes);
      const int64_t step = pair / kTileRows;
      for (int p = 0; p < kPlanes; ++p) _mm512_store_si512(at[step / kDepth % 2][step % kDepth][p][pair % kTileRows], planes[p]);
    }
  }
  const PlaneDecoder decoder;
  const char* packed;
  const float* scales;
  int64_t N, pair = 0;
  alignas(64) uint32_t at[2][kDepth][kPlanes][kTileRows][kTilePairs];
};

// dx[:, a strip] = dy w, its 64 columns at a time those of four tiles, one of each plane, in 0 to 3; dy through 4, W through 5.
void tiles_backward(const uint32_t* dy, int64_t M, int64_t N, int64_t K, const Packed& w, const float* absmax, int64_t k0, int64_t k1,
                    float* room, void* dx, Type type, int64_t ldx) {
  constexpr int64_t kDepth = RightAhead::kDepth;
  const int64_t steps = (N + 31) / 32, count = tiles_of(M), each = kTileRows / count + 1;
  float* const sums = room + strip_room(N);
  const ColumnsOfRows rows(w, absmax, N, K, k0, k1, room);
  const Tiles tiles(full_tiles());
  for (int64_t part = 0; part < rows.parts; ++part) {
    RightAhead right(rows, w.type, part);
    for (int64_t s0 = 0; s0 < steps; s0 += kDepth)
      for (int64_t t = 0; t < count; ++t) {
        const bool spill = count > 1, last = s0 + kDepth >= steps;
        float* own = sums + t * 4 * kTileFloats;
        if (spill || !s0) sums_start(s0 ? own : nullptr);
        for (int64_t s = 0; s < smaller(kDepth, steps - s0); ++s) {
          const auto& tile = right.at[s0 / kDepth % 2][s];
          tile_load<4>(dy + (t * steps + s0 + s) * kTileFloats, 64);
          tile_load<5>(tile[0], 64);
          tile_dot<0, 4, 5>();
          tile_load<5>(tile[1], 64);
          tile_dot<1, 4, 5>();
          tile_load<5>(tile[2], 64);
          tile_dot<2, 4, 5>();
          tile_load<5>(tile[3], 64);
          tile_dot<3, 4, 5>();
          right.fill(smaller(each, (s0 + 2 * kDepth) * kTileRows - right.pair));
        }
        if (spill || last) sums_store(own);
      }
    for (int64_t m = 0; m < M; ++m) {
      const float* from = sums + m / kTileRows * 4 * kTileFloats + m % kTileRows * kTilePairs;
      __m512 word[4];
      for (int p = 0; p < kPlanes; ++p) word[kPlaceOfPlane[p]] = _mm512_load_ps(from + p * kTileFloats);
      put_words(word, dx, type, m * ldx + k0 + part * kStripPart);
    }
  }
}

}  // namespace
