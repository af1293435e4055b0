// The tile registers of AMX-BF16: eight of 16 rows of 64 bytes, numbered by the template arguments.
//
// Include after the target pragma. With FP_EMULATED_TILES they are arrays in memory: the same kernels then run, under a
// sanitizer too, on a processor without them.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

constexpr int kTileRows = 16, kTilePairs = 16;  // rows, and pairs of bf16 (or fp32 values) of a row, at most

// What ldtilecfg reads: palette 1, and of each tile its bytes of a row and its rows.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  // Tiles [first, last).
  void set(int first, int last, int of_rows, int of_pairs) {
    for (int t = first; t < last; ++t) {
      rows[t] = static_cast<uint8_t>(of_rows);
      bytes[t] = static_cast<uint16_t>(4 * of_pairs);
    }
  }
};
static_assert(sizeof(TileShapes) == 64);

#ifdef FP_EMULATED_TILES
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
inline float bf16_of(uint32_t half) {  // a denormal is taken for zero
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
#else
// Not the intrinsics: GCC's take a literal for a tile, and do not say that memory is read.
inline void load_shapes(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void release_tiles() { asm volatile("tilerelease"); }
template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// C [rows, fp32] += A [rows, pairs] B [pairs, columns].
template <int C, int A, int B>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif

// The shapes of the tiles for as long as this lives.
struct Tiles {
  explicit Tiles(const TileShapes& shapes) { load_shapes(shapes); }
  ~Tiles() { release_tiles(); }
  Tiles(const Tiles&) = delete;
};

inline TileShapes full_tiles() {
  TileShapes shapes;
  shapes.set(0, 8, kTileRows, kTilePairs);
  return shapes;
}

}  // namespace
