// x wᵀ of bf16 rows with a 4-bit weight on tile registers: rows of W decoded by planes (planes.h) to left tiles, x in
// right tiles.
#pragma once
#include "simd/amx.h"
#include "simd/fourbit/planes.h"

namespace {

constexpr int64_t kTileFloats = kTileRows * kTilePairs;

inline int64_t tiles_of(int64_t n) { return (n + kTileRows - 1) / kTileRows; }

// Tiles 0 to 3 hold sums, four at once: the next product of one has to wait for its last.
template <int T = 0>
inline void sums_start(const float* from) {
  if constexpr (T < 4) {
    if (from) tile_load<T>(from + T * kTileFloats, 64);
    else tile_zero<T>();
    sums_start<T + 1>(from);
  }
}
template <int T = 0>
inline void sums_store(float* to) {
  if constexpr (T < 4) {
    tile_store<T>(to + T * kTileFloats, 64);
    sums_store<T + 1>(to);
  }
}

// Right tiles of rows of x, [tiles of 16 rows, chunks · planes, 16 pairs, columns].
struct RightTiles {
  RightTiles(int64_t M, int64_t K)
      : steps(whole_chunks(K) / kChunk * kPlanes),
        count(tiles_of(M)),
        columns(M < kTilePairs ? static_cast<int>(M) : kTilePairs) {}
  int64_t at(int64_t tile, int64_t step) const { return (tile * steps + step) * kTileRows * columns; }
  int64_t steps, count;
  int columns;
};

void amx_pack_forward(const Rows& x, int64_t m0, int64_t m1, int64_t K, int64_t first, int64_t last, uint32_t* out) {
  const RightTiles right(m1 - m0, K);
  const uint16_t* data = static_cast<const uint16_t*>(x.data);
  const __mmask16 columns = static_cast<__mmask16>((1u << right.columns) - 1);
  for (int64_t tile = 0; tile < right.count; ++tile)
    for (int64_t c = first; c < last; ++c) {
      __m512 planes[kPlanes][kTileRows];
      for (int i = 0; i < kTileRows; ++i) {
        const int64_t m = m0 + tile * kTileRows + i;
        __m512i of_row[kPlanes];
        to_planes(data + m * x.stride + c * kChunk, m < m1 ? K - c * kChunk : 0, of_row);
        for (int p = 0; p < kPlanes; ++p) planes[p][i] = _mm512_castsi512_ps(of_row[p]);
      }
      for (int p = 0; p < kPlanes; ++p) {
        transpose(planes[p]);
        uint32_t* to = out + right.at(tile, c * kPlanes + p);
        for (int j = 0; j < kTilePairs; ++j) _mm512_mask_storeu_ps(to + j * right.columns, columns, planes[p][j]);
      }
    }
}

// Rows of W, a chunk at a time, to left tiles.
struct LeftRows {
  LeftRows(const Packed& w, int64_t K, const float* absmax, int64_t n0, int64_t rows)
      : w(w),
        K(K),
        row_blocks(K / w.block_size),
        n0(n0),
        rows(rows),
        absmax(absmax),
        two_blocks(w.block_size < kChunk),
        decoder(w.type, two_blocks ? 0xffff0000u : 0u) {}

  // Rows [r0, r1) of a chunk to out[plane][row].
  template <int Rows>
  void decode(int64_t chunk, int64_t r0, int64_t r1, uint16_t (*out)[Rows][2 * kTilePairs]) const {
    const int64_t k = chunk * kChunk;
    const uint8_t* from = w.data + ((n0 + r0) * K + k) / 2;
    const float* scales = absmax + r0 * row_blocks + k / w.block_size;
    for (int64_t r = r0; r < smaller(r1, rows); ++r, from += K / 2, scales += row_blocks) {
      __m512i planes[kPlanes];
      __builtin_prefetch(from + Rows * (K / 2), 0, 2);  // the next task
      if (k + kChunk <= K) decoder.planes(_mm512_loadu_si512(from), scales[0], scales[two_blocks], planes);
      else decoder.planes(_mm512_maskz_loadu_epi64(0x0f, from), scales[0], 0.0f, planes);  // half a chunk
      for (int p = 0; p < kPlanes; ++p) _mm512_store_si512(out[p][r], planes[p]);
    }
  }

  int64_t chunks() const { return whole_chunks(K) / kChunk; }

  const Packed& w;
  int64_t K, row_blocks, n0, rows;
  const float* absmax;
  bool two_blocks;  // to a chunk
  PlaneDecoder decoder;
};

// The sums of 16 rows of W and 16 of x, a tile, to y.
inline void store_sums(const float* sums, int64_t m0, int64_t M, int64_t n, int64_t count, void* y, Type type,
                       int64_t ldy) {
  __m512 v[16];
  for (int i = 0; i < 16; ++i) v[i] = _mm512_load_ps(sums + i * kTilePairs);
  transpose(v);
  for (int64_t i = 0, m = m0; i < kTileRows && m < M; ++i, ++m) store_16(v[i], y, type, m * ldy + n, count);
}

// Left tiles of the rows of a task, `Depth` chunks at a time, decoded a few rows after every few products: tiles that
// have not multiplied for half a microsecond take as long again to begin (measured on Emerald Rapids).
template <int Rows, int Depth>
struct LeftAhead {
  explicit LeftAhead(const LeftRows& w) : w(w) {
    if (w.rows < Rows) std::memset(decoded, 0, sizeof(decoded));
    fill(Rows * Depth);
  }
  // Decodes `count` more rows of chunks, none past the last.
  void fill(int64_t count) {
    const int64_t chunks = w.chunks();
    while (count > 0 && chunk < chunks) {
      const int64_t end = smaller(Rows, row + count);
      w.decode(chunk, row, end, decoded[chunk / Depth % 2] + chunk % Depth * kPlanes);
      count -= end - row;
      row = end;
      if (row == Rows) row = 0, ++chunk;
    }
  }
  // Rows of chunks that are left before a group of `Depth` chunks.
  int64_t until(int64_t group) const { return (group * Depth - chunk) * Rows - row; }

  const LeftRows& w;
  int64_t chunk = 0, row = 0;
  alignas(64) uint16_t decoded[2][Depth * kPlanes][Rows][2 * kTilePairs];
};

// Up to 16 rows of x: 64 rows of W, the i-th 16 in tile i. W goes through tile 4, x through 5.
void amx_forward_16(const uint32_t* x, const RightTiles& right, int64_t M, const LeftRows& w, void* y, Type type,
                    int64_t ldy) {
  constexpr int kRows = 4 * kTileRows;
  alignas(64) float sums[4 * kTileFloats];
  LeftAhead<kRows, 1> left(w);
  sums_start(nullptr);
  for (int64_t c = 0; c < w.chunks(); ++c)
    for (int p = 0; p < kPlanes; ++p) {
      const auto& rows = left.decoded[c % 2][p];
      tile_load<5>(x + right.at(0, c * kPlanes + p), 4 * right.columns);
      tile_load<4>(rows[0], 64);
      tile_dot<0, 4, 5>();
      left.fill(kTileRows / kPlanes);
      tile_load<4>(rows[kTileRows], 64);
      tile_dot<1, 4, 5>();
      left.fill(kTileRows / kPlanes);
      tile_load<4>(rows[2 * kTileRows], 64);
      tile_dot<2, 4, 5>();
      left.fill(kTileRows / kPlanes);
      tile_load<4>(rows[3 * kTileRows], 64);
      tile_dot<3, 4, 5>();
      left.fill(kTileRows / kPlanes);
    }
  sums_store(sums);
  for (int64_t a = 0; a < w.rows; a += kTileRows)
    store_sums(sums + a * kTilePairs, 0, M, w.n0 + a, w.rows - a, y, type, ldy);
}

constexpr int64_t kAmxGroupRows = 128;

// More rows: 32 rows of W by 32 of x, the halves a and b in tile 2 a + b. W goes through 4 and 5, x through 6 and 7.
void amx_forward_many(const uint32_t* x, const RightTiles& right, int64_t M, const LeftRows& w, void* y, Type type,
                      int64_t ldy) {
  constexpr int kRows = 2 * kTileRows, kDepth = 2;
  alignas(64) float sums[kAmxGroupRows * kRows];
  LeftAhead<kRows, kDepth> left(w);
  const int64_t chunks = w.chunks(), rows_per_step = kRows / kPlanes / ((right.count + 1) / 2) + 1;
  for (int64_t c0 = 0; c0 < chunks; c0 += kDepth) {
    const auto& tiles = left.decoded[c0 / kDepth % 2];
    for (int64_t t = 0; t < right.count; t += 2) {
      float* tile_sums = sums + t * 2 * kTileFloats;
      const bool both = t + 1 < right.count;
      sums_start(c0 ? tile_sums : nullptr);
      for (int64_t s = 0; s < smaller(kDepth, chunks - c0) * kPlanes; ++s) {
        tile_load<6>(x + right.at(t, c0 * kPlanes + s), 64);
        tile_load<4>(tiles[s][0], 64);
        tile_dot<0, 4, 6>();
        tile_load<5>(tiles[s][kTileRows], 64);
        tile_dot<2, 5, 6>();
        if (both) {
          tile_load<7>(x + right.at(t + 1, c0 * kPlanes + s), 64);
          tile_dot<1, 4, 7>();
          tile_dot<3, 5, 7>();
        }
        left.fill(smaller(rows_per_step, left.until(c0 / kDepth + 2)));
      }
      sums_store(tile_sums);
    }
  }
  for (int64_t t = 0; t < right.count; ++t)
    for (int64_t a = 0; a < w.rows; a += kTileRows)
      store_sums(sums + (t / 2 * 4 + a / kTileRows * 2 + t % 2) * kTileFloats, t * kTileRows, M, w.n0 + a, w.rows - a,
                 y, type, ldy);
}

void amx_forward(const uint32_t* x, int64_t M, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1,
                 float*, void* y, Type type, int64_t ldy) {
  const RightTiles right(M, K);
  const LeftRows left(w, K, absmax, n0, n1 - n0);
  TileShapes shapes = full_tiles();
  if (right.count == 1) {
    shapes.set(0, 4, kTileRows, right.columns);
    shapes.set(5, 6, kTileRows, right.columns);
  }
  const Tiles tiles(shapes);
  if (right.count == 1) amx_forward_16(x, right, M, left, y, type, ldy);
  else amx_forward_many(x, right, M, left, y, type, ldy);
}

int64_t amx_weight_rows(int64_t M) { return M > kTileRows ? 32 : 64; }
int64_t amx_scratch(int64_t, int64_t) { return 0; }

}  // namespace
