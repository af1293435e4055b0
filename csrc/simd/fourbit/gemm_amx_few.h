// x wᵀ of few bf16 rows with a 4-bit weight as it is stored, on tile registers: as in gemm_amx.h, but absmax is multiplied into
// the sums of blocks.
//
// With so few rows it is decoding that takes the time, half of it the tables of code · absmax. Here a left tile holds codes alone, 32 of
// one block. The columns of a right tile are the rows of x for each block of a chunk, and zero where the block is another: so the
// products of a chunk are the sums of its blocks. What is decoded stays in an L1 cache; a line that is stored beyond it takes four times
// as long.
#pragma once
#include "simd/fourbit/gemm_amx_common.h"

namespace {

constexpr int kSteps = 4;                                  // left tiles of a chunk, two for every 64 weights
constexpr int64_t kGroups = tiled_weights(1) / kTileRows;  // of 16 rows of W in a call at most
constexpr int64_t kDecodedRows = 4;                        // between two products

struct FewShape {
  FewShape(int64_t M, int64_t block_size) : M(M), parts(block_size == kLeastTiledBlock ? 2 : 1), columns(M * parts) {}
  // With more, the sums take longer than the tables (measured at K = N = 4096).
  bool few() const { return columns <= 8; }
  int64_t M, parts, columns;  // parts: the blocks of a chunk, 1 of a larger block too
};

// Of 64 weights, those of two left tiles' rows: the low nibbles of the even bytes, then of the odd ones, and the high ones likewise.
constexpr Indices<uint16_t, 64> kPlacesOfSteps([](int i) { return i % 16 * 4 + i / 16 % 2 * 2 + 1 - i / 32; });

// Of 32 bytes twice: all of them, then the odd ones in the place of the even.
constexpr Indices<uint8_t, 64> kBytesOfSteps([](int i) { return i % 16 | i / 32; });

// Right tiles, [steps, 16 pairs, columns].
void arrange_few(const Rows& x, int64_t m0, const FewShape& shape, int64_t K, uint32_t* out) {
  const uint16_t* data = static_cast<const uint16_t*>(x.data);
  const __mmask16 columns = static_cast<__mmask16>(first_of_32(shape.columns));
  for (int64_t k = 0; k < K; k += 64) {
    const int64_t first = k / 64 % shape.parts * shape.M;
    __m512 steps[2][kTileRows];
    for (int i = 0; i < kTileRows; ++i) {
      const bool own = i >= first && i < first + shape.M;
      const uint16_t* row = data + (own ? (m0 + i - first) * x.stride + k : 0);
      const __mmask32 mask = own ? 0xffffffffu : 0u;
      const __m512i low = _mm512_maskz_loadu_epi16(mask, row), high = _mm512_maskz_loadu_epi16(mask, row + 32);
      for (int s = 0; s < 2; ++s)
        steps[s][i] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(low, _mm512_load_si512(kPlacesOfSteps.at + 32 * s), high));
    }
    for (int s = 0; s < 2; ++s) {
      transpose(steps[s]);
      for (int j = 0; j < kTilePairs; ++j, out += shape.columns) _mm512_mask_storeu_ps(out, columns, steps[s][j]);
    }
  }
}

// Rows of W to left tiles of codes: 16 rows of a chunk, an item, after the other, and then of the next chunk.
struct CodeRows {
  static constexpr int64_t kAhead = 2, kRoom = 4;  // items: what was stored last is not loaded next
  const int64_t groups, chunks;  // items of a chunk, and chunks
  const PairCodes codes;

  CodeRows(const Packed& w, int64_t K, int64_t n0, int64_t n1)
      : groups(tiles_of(n1 - n0)), chunks(chunks_of(K)), codes(w.type), data(w.data + n0 * (K / 2)), row_bytes(K / 2), rows(n1 - n0) {
    if (rows % kTileRows) std::memset(room, 0, sizeof(room));
    for (int64_t i = 0; i < kAhead * kTileRows / kDecodedRows; ++i) next();
  }

  const uint16_t (*at(int64_t item) const)[kTileRows][2 * kTilePairs] { return room[item % kRoom]; }

  // The next kDecodedRows rows, if there are any.
  inline void next() {
    if (chunk == chunks) return;
    const int64_t first = group * kTileRows + row, count = smaller(kDecodedRows, rows - first);
    const uint8_t* from = data + first * row_bytes + chunk * (kTiledWeights / 2);
    uint16_t* to = room[item % kRoom][0][row];
    const bool whole = (chunk + 1) * (kTiledWeights / 2) <= row_bytes;
    if (whole && count == kDecodedRows) decode(from, row_bytes, kDecodedRows, 2, to);  // all of it constants
    else decode(from, row_bytes, count, whole ? 2 : 1, to);
    row += kDecodedRows;
    if (row < kTileRows) return;
    row = 0;
    ++item;
    if (++group == groups) group = 0, ++chunk;
  }

 private:
  inline void decode(const uint8_t* from, int64_t stride, int64_t count, int64_t halves, uint16_t* to) const {
    constexpr int64_t kTile = kTileRows * 2 * kTilePairs;
    const __m512i table = codes.table, bytes = _mm512_load_si512(kBytesOfSteps.at);
    for (int64_t r = 0; r < count; ++r, from += stride, to += 2 * kTilePairs) {
      __builtin_prefetch(from + kGroups * kTileRows * stride, 0, 2);  // of the next call
      for (int64_t half = 0; half < halves; ++half) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * half));
        const __m512i index = _mm512_shuffle_epi8(_mm512_broadcast_i64x4(words), bytes);
        _mm512_store_si512(to + 2 * half * kTile, _mm512_permutexvar_epi16(index, table));
        _mm512_store_si512(to + (2 * half + 1) * kTile, _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 4), table));
      }
    }
  }

  const uint8_t* data;
  int64_t row_bytes, rows;
  int64_t item = 0, chunk = 0, group = 0, row = 0;  // where the next ones are
  alignas(64) uint16_t room[kRoom][kSteps][kTileRows][2 * kTilePairs];
};

// The sums of blocks, those of several chunks side by side where 16 lanes hold them, and of their products with absmax. (A block of
// more than a chunk is summed chunk by chunk.)
struct BlockSums {
  const FewShape shape;

  BlockSums(const FewShape& shape, int64_t K, int64_t block_size, const float* absmax, int64_t rows)
      : shape(shape), chunks(chunks_of(K)), beside(kTilePairs / shape.columns), row_blocks(K / block_size), rows(rows), absmax(absmax), shift(0) {
    while (kTiledWeights / shape.parts << shift < block_size) ++shift;
    for (int i = 0; i < kTilePairs; ++i) place[i] = static_cast<int>(i / shape.M);
    for (int64_t r = 0; r < tiles_of(rows) * kTileRows; ++r) _mm512_store_ps(total[r], _mm512_setzero_ps());
  }

  // Tile T holds those of a group's rows.
  template <int T>
  void put(int64_t chunk, int64_t group) {
    const int64_t at = chunk % beside;
    if (at == 0 && chunk) add(chunk - beside, group);
    tile_store<T>(sums[group * kTileRows] + at * shape.columns, 64);
  }

  // y[m, n + r] for all rows r, times a factor.
  void finish(float factor, void* y, Type type, int64_t ldy, int64_t n) {
    for (int64_t group = 0; group < tiles_of(rows); ++group) {
      add((chunks - 1) / beside * beside, group);
      __m512 lanes[kTilePairs];
      for (int i = 0; i < kTileRows; ++i) lanes[i] = _mm512_load_ps(total[group * kTileRows + i]);
      transpose(lanes);
      for (int64_t m = 0; m < shape.M; ++m) {
        __m512 sum = lanes[m];
        for (int64_t i = m + shape.M; i < beside * shape.columns; i += shape.M) sum = _mm512_add_ps(sum, lanes[i]);
        put_16(_mm512_mul_ps(sum, _mm512_set1_ps(factor)), y, type, m * ldy + n + group * kTileRows, rows - group * kTileRows);
      }
    }
  }

 private:
  // The sums from chunk `first` on.
  void add(int64_t first, int64_t group) {
    const int64_t block = first * shape.parts >> shift, r0 = group * kTileRows, stride = row_blocks;
    const __mmask16 lanes = static_cast<__mmask16>(first_of_32(smaller(beside, chunks - first) * shape.columns));
    const __mmask16 blocks = static_cast<__mmask16>(first_of_32(stride - block));
    const __m512i own = _mm512_add_epi32(_mm512_load_si512(place), _mm512_set1_epi32(static_cast<int>(first * shape.parts)));
    const __m512i index = _mm512_sub_epi32(_mm512_srl_epi32(own, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(static_cast<int>(block)));
    const float *from = sums[r0], *scales = absmax + r0 * stride + block;
    float* to = total[r0];
    for (int64_t r = smaller(kTileRows, rows - r0); r > 0; --r) {
      const __m512 scale = _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps(blocks, scales));
      _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_maskz_load_ps(lanes, from), scale, _mm512_load_ps(to)));
      scales += stride;
      from += kTilePairs;
      to += kTilePairs;
    }
  }

  int64_t chunks, beside, row_blocks, rows;
  const float* absmax;
  int shift;  // of 64 or 128 weights to a block
  alignas(64) int place[kTilePairs];
  alignas(64) float sums[kGroups * kTileRows][kTilePairs], total[kGroups * kTileRows][kTilePairs];
};

// Sums in tile 0 or 1, in turn; W through 2 and 3; a chunk of x in 4 to 7. Products stand between rows that are decoded, so that each
// finds the other's units free however short the processor looks ahead, and a sum is stored while the next is made.
struct FewProduct {
  FewProduct(const FewShape& shape, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1)
      : halves(2 * K / kTiledWeights), left(w, K, n0, n1), sums(shape, K, w.block_size, absmax, n1 - n0) {}

  void run(const uint32_t* x) {
    const int64_t row = 4 * sums.shape.columns, step = kTilePairs * sums.shape.columns;
    for (int64_t c = 0; c < left.chunks; ++c, x += kSteps * step) {
      tile_load<4>(x, row);
      tile_load<5>(x + step, row);
      if (2 * c + 1 < halves) {
        tile_load<6>(x + 2 * step, row);
        tile_load<7>(x + 3 * step, row);
      }
      for (int64_t group = 0; group < left.groups; ++group) {
        if (items % 2) item<1>(c, group);
        else item<0>(c, group);
      }
    }
    if (items % 2) sums.put<0>(chunk_before, group_before);
    else sums.put<1>(chunk_before, group_before);
  }

  template <int T>
  inline void item(int64_t chunk, int64_t group) {
    const auto tiles = left.at(items);
    const bool whole = 2 * chunk + 1 < halves;
    tile_zero<T>();
    tile_load<2>(tiles[0], 64);
    tile_dot<T, 2, 4>();
    left.next();
    tile_load<3>(tiles[1], 64);
    tile_dot<T, 3, 5>();
    left.next();
    if (items) sums.put<1 - T>(chunk_before, group_before);
    if (whole) {
      tile_load<2>(tiles[2], 64);
      tile_dot<T, 2, 6>();
    }
    left.next();
    if (whole) {
      tile_load<3>(tiles[3], 64);
      tile_dot<T, 3, 7>();
    }
    left.next();
    chunk_before = chunk;
    group_before = group;
    ++items;
  }

  int64_t halves, items = 0, chunk_before = 0, group_before = 0;
  CodeRows left;
  BlockSums sums;
};

void forward_few(const uint32_t* x, const FewShape& shape, int64_t K, const Packed& w, const float* absmax, int64_t n0, int64_t n1, void* y,
                 Type type, int64_t ldy) {
  TileShapes shapes = full_tiles();
  shapes.set(0, 2, kTileRows, static_cast<int>(shape.columns));
  shapes.set(4, 8, kTileRows, static_cast<int>(shape.columns));
  const Tiles tiles(shapes);
  FewProduct product(shape, K, w, absmax, n0, n1);
  product.run(x);
  product.sums.finish(1.0f / product.left.codes.unit, y, type, ldy, n0);
}

}  // namespace
