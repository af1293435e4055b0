// The twins of the tile instructions in csrc/simd/amx.h: tiles are arrays in memory, so that kernels for AMX run on a
// processor without it, and a sanitizer sees what they read and write. csrc/simd/amx.h includes it where
// FP_EMULATED_TILES is defined.
#pragma once

namespace {

struct {
  TileShapes shapes;
  uint32_t at[8][kTileRows][kTilePairs];
} thread_local tiles;

inline void load_shapes(const TileShapes& shapes) {
  tiles.shapes = shapes;
  std::memset(tiles.at, 0, sizeof(tiles.at));
}
inline void release_tiles() { tiles.shapes = {}; }

template <int T>
inline void tile_zero() {
  std::memset(tiles.at[T], 0, sizeof(tiles.at[T]));
}

template <int T>
inline void tile_load(const void* from, int64_t stride) {
  tile_zero<T>();
  for (int i = 0; i < tiles.shapes.rows[T]; ++i)
    std::memcpy(tiles.at[T][i], static_cast<const char*>(from) + i * stride, tiles.shapes.bytes[T]);
}

template <int T>
inline void tile_store(void* to, int64_t stride) {
  for (int i = 0; i < tiles.shapes.rows[T]; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, tiles.at[T][i], tiles.shapes.bytes[T]);
}

inline float bf16_of(uint32_t half) {  // denormals are flushed to zero
  const uint32_t bits = half << 16;
  float value = 0.0f;
  if (bits & 0x7f800000u) std::memcpy(&value, &bits, 4);
  return value;
}

template <int C, int A, int B>
inline void tile_dot() {
  for (int m = 0; m < tiles.shapes.rows[C]; ++m)
    for (int k = 0; k < tiles.shapes.rows[B]; ++k)
      for (int n = 0; n < tiles.shapes.bytes[C] / 4; ++n) {
        const uint32_t a = tiles.at[A][m][k], b = tiles.at[B][k][n];
        float sum;
        std::memcpy(&sum, &tiles.at[C][m][n], 4);
        sum += bf16_of(a & 0xffffu) * bf16_of(b & 0xffffu);
        sum += bf16_of(a >> 16) * bf16_of(b >> 16);
        std::memcpy(&tiles.at[C][m][n], &sum, 4);
      }
}

}  // namespace
