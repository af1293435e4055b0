// What the products of bf16 rows with a 4-bit weight on the tile registers of AMX-BF16 share.
#pragma once
#include "simd/fourbit/planes.h"

namespace {

constexpr int64_t kTileFloats = kTileRows * kTilePairs;

inline int64_t chunks_of(int64_t K) { return (K + kTiledWeights - 1) / kTiledWeights; }
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

}  // namespace
