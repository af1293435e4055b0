// The tile registers of AMX-BF16: eight, of 16 rows of 64 bytes. Template arguments are their numbers.
//
// Include after the target pragma. With FP_EMULATED_TILES, for tests, tests/emulator/amx_emu.h takes their place:
// arrays in memory.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

constexpr int kTileRows = 16, kTilePairs = 16;  // at most: rows, and pairs of bf16 (or fp32 values) in a row

// What ldtilecfg reads: palette 1, and for every tile the bytes of a row and the rows.
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

}  // namespace

#ifdef FP_EMULATED_TILES
#include <amx_emu.h>
#else
namespace {

// Not intrinsics: GCC's accept only literals as tiles, and do not declare that memory is read.
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

}  // namespace
#endif

namespace {

// Configures the tiles while it lives.
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
