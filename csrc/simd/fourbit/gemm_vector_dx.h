// dy w of bf16 rows with a 4-bit weight on vectors: 64 columns of W decoded, 128 of its rows at a time, into an L1 cache for every row of dy.
//
// The words of two rows of W stand in turn before they are decoded: so a lane of a plane is a pair of rows, which is what a product
// sums, and absmax, which differs between the rows of a sum, is in the table (see planes.h).
#pragma once
#include "simd/fourbit/gemm_vector.h"
#include "simd/fourbit/planes.h"

namespace {

// [blocks of rows of W, parts of rows of dy, pairs of rows, rows of a part], zero past the end.
void arrange_blocks_backward(const Rows& dy, int64_t m0, int64_t m1, int64_t N, int64_t first, int64_t last, uint32_t* out) {
  arrange_steps(dy, m0, m1, N, first, last, out, [](__m512i&) {});
}

// 128 rows of a strip's part, to at[pair of rows][plane].
struct BlockedPairs {
  BlockedPairs(const ColumnsOfRows& w, FourBit type, int64_t part)
      : decoder(type, 0xaaaaaaaau), packed(w.packed + part * w.N * 32), scales(w.scales + part * w.N), N(w.N) {}

  // From row n0 on; returns how many pairs.
  int64_t decode(int64_t n0) {
    const __m512i turn = _mm512_load_si512(kPairsOfRows.at);
    const int64_t count = smaller(kChunk, N - n0);
    for (int64_t i = 0; i + 2 <= count; i += 2) {
      const int64_t n = n0 + i;
      decoder.planes(_mm512_permutexvar_epi16(turn, _mm512_loadu_si512(packed + n * 32)), scales[n], scales[n + 1], at[i / 2]);
    }
    if (count % 2) {
      const int64_t n = n0 + count - 1;
      decoder.planes(_mm512_permutexvar_epi16(turn, _mm512_maskz_loadu_epi64(0x0f, packed + n * 32)), scales[n], 0.0f, at[count / 2]);
    }
    return (count + 1) / 2;
  }

  const PlaneDecoder decoder;
  const char* packed;
  const float* scales;
  int64_t N;
  __m512i at[kSteps][kPlanes];
};

// totals[row][plane] += dy w for some rows of dy and `count` pairs of rows of W.
template <int Rows>
inline void block_part_backward(const uint32_t* dy, const __m512i (*w)[kPlanes], int64_t count, float* totals) {
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

void blocks_backward(const uint32_t* dy, int64_t M, int64_t N, int64_t K, const Packed& w, const float* absmax, int64_t k0, int64_t k1,
                     float* room, void* dx, Type type, int64_t ldx) {
  float* const totals = room + strip_room(N);
  const ColumnsOfRows columns(w, absmax, N, K, k0, k1, room);
  for (int64_t part = 0; part < columns.parts; ++part) {
    BlockedPairs rows(columns, w.type, part);
    std::memset(totals, 0, static_cast<size_t>(M * kStripPart) * sizeof(float));
    for (int64_t n0 = 0; n0 < N; n0 += kChunk) {
      const int64_t count = rows.decode(n0);
      for_parts(M, [&](int64_t m, int64_t of_part) {
        static constexpr decltype(&block_part_backward<1>) kParts[] = {block_part_backward<1>, block_part_backward<2>, block_part_backward<3>,
                                                                       block_part_backward<4>, block_part_backward<5>, block_part_backward<6>};
        kParts[of_part - 1](dy + (n0 / kChunk * M + m) * kSteps, rows.at, count, totals + m * kStripPart);
      });
    }
    for (int64_t m = 0; m < M; ++m) {
      __m512 word[kPlanes];
      for (int p = 0; p < kPlanes; ++p) word[kPlaceOfPlane[p]] = _mm512_load_ps(totals + m * kStripPart + p * kLanes);
      put_words(word, dx, type, m * ldx + k0 + part * kStripPart);
    }
  }
}

}  // namespace
