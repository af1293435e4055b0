// The kernels of cpu_kernels.h for one instruction set. The including file sets FP_ISA and FP_TABLE, and the target.
//
// Two products make up all of LoRA on a CPU, and one micro-kernel serves both: C[MR][NV vectors] += A · B, with A broadcast
// from thin or strided storage and B read as whole vectors of contiguous rows.
//   reduce: the long dimension is summed (x aᵀ, dy b): A = rows of x, B = the packed panel [K, R].
//   grad:   the rows are summed (dsᵀ x, sᵀ dy): A = s with the rank as its row, B = rows of x as they lie.
//   expand: the rank is summed (s bᵀ, ds a): A = rows of s, B = the packed panel [R, N].
// Compute-bound at rank >= 16: 2R FLOP for each element of x, against 4 bytes read once from memory.
#pragma once
#include "cpu_dots_impl.h"
#include "cpu_masks_impl.h"
#include "cpu_tile_impl.h"
#if FP_ISA >= 2
#include "transpose_impl.h"
#endif
#if FP_ISA >= 3
#include "cpu_bf16_expand_impl.h"
#endif
#include "fourbit_decode_impl.h"
#include "fourbit_encode_impl.h"
#include "fourbit_product_impl.h"
#ifdef FP_TILES
#include "fourbit_amx_dx_impl.h"
#include "fourbit_amx_impl.h"
#include "fourbit_bytes_impl.h"
#elif FP_ISA >= 3
#include "fourbit_blocks_dx_impl.h"
#endif

namespace {

using namespace fastpeft;

#if FP_ISA >= 2  // 32 registers
constexpr int kReduceRows2 = 12, kReduceRows1 = 12, kGradRows = 8, kGradVectors = 2, kExpandRows = 6, kExpandVectors = 4;
#else            // 16 registers: 12 accumulators, 2 or 3 of B, 1 broadcast
constexpr int kReduceRows2 = 6, kReduceRows1 = 12, kGradRows = 6, kGradVectors = 2, kExpandRows = 6, kExpandVectors = 2;
#endif

// The columns that reduce and grad take at a time, and the row stride of their copy: an odd number of cache lines, so that
// a column of it spreads over all sets of an L1 cache.
constexpr int64_t kWidth = 128, kLead = kWidth + 16;

constexpr int64_t vectors(int64_t n) { return (n + kLanes - 1) / kLanes; }

// The block that is read next. Its lines are asked for while this one is multiplied, a few between two tiles: in one
// burst they would queue for the few that a core can have under way.
struct Ahead {
  const char* at;  // null: none
  int64_t stride, size;  // bytes between rows, of an element
  void fetch(int64_t m0, int64_t rows, int64_t column, int64_t n) const {
    if (!at) return;
    for (int64_t m = m0; m < m0 + rows; ++m)
      for (int64_t byte = column * size; byte < (column + n) * size; byte += 64) __builtin_prefetch(at + m * stride + byte, 0, 2);
  }
};

// The rows of one copy: it waits for memory while the rows before it are multiplied.
constexpr int64_t kGroup = 12;

// s [m0 : m0 + rows, R] += x [rows, n] panel for the rows of one group, n <= kWidth.
inline void reduce_group(const float* x, int64_t ldx, int64_t m0, int64_t rows, int64_t n, const float* panel, int64_t ldp, int64_t R,
                         float* s, const Ahead& ahead) {
  const int64_t all = vectors(R);
  for (int64_t k = 0; k < n; k += kShortSum) {
    const int64_t count = smaller(kShortSum, n - k);
    ahead.fetch(m0, rows, k, count);
    for (int64_t v = 0; v < all; v += 2) {
      const auto some = v + 2 <= all ? rows_of<kReduceRows2, 2, true> : rows_of<kReduceRows1, 1, true>;
      some(x + k, ldx, 1, rows, panel + k * ldp + v * kLanes, ldp, count, nullptr, 1.0f, s + m0 * ldp + v * kLanes, ldp);
    }
  }
}

inline void grad_block(const float* left, int64_t ldl, int64_t R, const float* x, int64_t ldx, int64_t rows, int64_t n,
                       float* grad, int64_t ldg, const Ahead& ahead) {
  const int64_t all = vectors(n);
  for (int64_t v = 0; v < all;) {
    const bool wide = v + kGradVectors <= all;
    const int64_t c = v * kLanes, step = wide ? kGradVectors : 1;
    ahead.fetch(0, rows, c, step * kLanes);
    const auto some = wide ? rows_of<kGradRows, kGradVectors, true> : rows_of<kGradRows, 1, true>;
    some(left, 1, ldl, R, x + c, ldx, rows, nullptr, 1.0f, grad + c, ldg);
    v += step;
  }
}

// One row of a block to fp32, masked; the padding up to a whole vector is zero.
template <Type T>
inline void fetch(const void* x, int64_t base, int64_t n, const uint8_t* bits, float* out) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t column = 0; !bits && column < whole; column += kLanes) store(out + column, load_as_float<T>(x, base + column));
  for (int64_t column = bits ? 0 : whole; column < n; column += kLanes) {
    const vf v = load_some<T>(x, base + column, n - column);
    store(out + column, bits ? masked(v, get_bits(bits, column)) : v);
  }
}

// In groups of 16 rows, of four sums each: one running sum over thousands of rows would lose digits.
inline void column_sums(const float* x, int64_t ldx, int64_t rows, int64_t n, float* sums) {
  for (int64_t c = 0; c < n; c += kLanes) {
    vf total = vf{};
    for (int64_t m0 = 0; m0 < rows; m0 += 16) {
      vf part[4] = {};
      for (int64_t m = m0; m < smaller(m0 + 16, rows); ++m) part[m % 4] += load<vf>(x + m * ldx + c);
      total += (part[0] + part[1]) + (part[2] + part[3]);
    }
    store(sums + c, load<vf>(sums + c) + total);
  }
}

template <Type T>
void reduce_as(const Rows& x, int64_t m0, int64_t m1, int64_t width, Bits mask, const float* panel, int64_t ldp, int64_t R,
               float* s, const float* left, int64_t ldl, float* grad, int64_t ldg, float* sums) {
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  const int64_t rows = m1 - m0;
  alignas(64) float buffer[kRows * kLead];
  for (int64_t k0 = 0; k0 < width; k0 += kWidth) {
    const int64_t n = smaller(kWidth, width - k0);
    const char* block = static_cast<const char*>(x.data) + (m0 * x.stride + k0) * size;
    const Ahead none = {nullptr, 0, 0};
    // These rows' next columns, or the first ones of the rows after them.
    const Ahead next = {k0 + kWidth < width ? block + kWidth * size : m1 < x.count ? block + (rows * x.stride - k0) * size : nullptr,
                        x.stride * size, size};
    // Whole vectors of fp32 are read where they lie by grad, which takes each once for many ranks, but by reduce from a copy
    // of a few rows: at a width of 1024 the addresses of all rows fall on one set of an L1 cache. The copy of anything
    // else serves both.
    const bool direct = T == Type::f32 && !mask.data && n % kLanes == 0;
    for (int64_t g = 0; g < rows && (s || !direct); g += kGroup) {
      const int64_t group = smaller(kGroup, rows - g);
      float* copy = direct ? buffer : buffer + g * kLead;
      for (int64_t m = 0; m < group; ++m) fetch<T>(x.data, (m0 + g + m) * x.stride + k0, n, mask.row(g + m, k0), copy + m * kLead);
      if (s) reduce_group(copy, kLead, g, group, n, panel + k0 * ldp, ldp, R, s, next);
    }
    const float* from = direct ? reinterpret_cast<const float*>(block) : buffer;
    const int64_t ldf = direct ? x.stride : kLead;
    if (grad) grad_block(left, ldl, R, from, ldf, rows, n, grad + k0, ldg, s ? none : next);
    if (sums) column_sums(from, ldf, rows, n, sums + k0);
  }
}

void reduce(Rows x, int64_t m0, int64_t m1, int64_t width, Bits mask, const float* panel, int64_t ldp, int64_t R, float scale,
            float* s, const float* left, int64_t ldl, float* grad, int64_t ldg, float* sums) {
  const int64_t count = (m1 - m0) * ldp;
  if (s) std::memset(s, 0, static_cast<size_t>(count) * sizeof(float));
#if FP_ISA >= 3
  if (in_pairs(x.type, R)) return reduce_pairs(x, m0, m1, width, mask, panel, ldp, R, scale, s, left, ldl, grad, ldg, sums);
#endif
  auto as = x.type == Type::f32 ? reduce_as<Type::f32> : x.type == Type::bf16 ? reduce_as<Type::bf16> : reduce_as<Type::f16>;
  as(x, m0, m1, width, mask, panel, ldp, R, s, left, ldl, grad, ldg, sums);
  for (int64_t i = 0; s && scale != 1.0f && i < count; i += kLanes) store(s + i, scale * load<vf>(s + i));
}

// out [rows, n] = bias + scale * s b.
inline void expand_block(const float* s, int64_t lds, int64_t rows, const float* panel, int64_t ldp, int64_t R, const float* bias,
                         float scale, float* out, int64_t ldo, int64_t n) {
  const int64_t all = vectors(n);
  for (int64_t r = 0; r == 0 || r < R; r += kShortSum) {
    const auto wide = r ? rows_of<kExpandRows, kExpandVectors, true> : rows_of<kExpandRows, kExpandVectors, false>;
    const auto thin = r ? rows_of<kExpandRows, 1, true> : rows_of<kExpandRows, 1, false>;
    const int64_t count = smaller(kShortSum, R - r);
    for (int64_t v = 0; v < all;) {
      const bool whole = v + kExpandVectors <= all;
      const int64_t c = v * kLanes;
      const auto some = whole ? wide : thin;
      some(s + r, lds, 1, rows, panel + r * ldp + c, ldp, count, bias && !r ? bias + c : nullptr, scale, out + c, ldo);
      v += whole ? kExpandVectors : 1;
    }
  }
}

// The panel of a block of columns, in floats: where fp32 is written in place, blocks as wide as a cache allows, so that
// memory sees whole rows in the order of their addresses.
constexpr int64_t kPanelFloats = 1 << 14;

template <Type T>
void expand_as(const float* s, int64_t lds, int64_t m0, int64_t m1, int64_t R, const float* panel, int64_t ldp,
               const float* bias, float scale, Bits mask, bool add, void* y, int64_t stride, int64_t width) {
  alignas(64) float buffer[kExpandRows * kCols];
  const bool direct = T == Type::f32 && !add && width % kLanes == 0;
  const int64_t step = direct && R * kCols < kPanelFloats ? kPanelFloats / (R + !R) / kCols * kCols : kCols;
  for (int64_t n0 = 0; n0 < width; n0 += step) {
    const int64_t n = smaller(step, width - n0);
    for (int64_t m = m0; m < m1; m += kExpandRows) {
      const int64_t rows = smaller(kExpandRows, m1 - m);
      float* out = direct ? static_cast<float*>(y) + m * stride + n0 : buffer;
      const int64_t ldo = direct ? stride : kCols;
      expand_block(s + (m - m0) * lds, lds, rows, panel + n0, ldp, R, bias ? bias + n0 : nullptr, scale, out, ldo, n);
      for (int64_t i = 0; i < rows && !(direct && !mask.data); ++i) {
        const int64_t base = (m + i) * stride + n0;
        const float* row = out + i * ldo;
        const uint8_t* bits = mask.row(m + i - m0, n0);
        for (int64_t column = 0; column < n; column += kLanes) {
          vf value = load<vf>(row + column);
          if (bits) value = masked(value, get_bits(bits, column));
          if (add) value += load_some<T>(y, base + column, n - column);
          store_some<T>(y, base + column, value, n - column);
        }
      }
    }
  }
}

void expand(const float* s, int64_t lds, int64_t m0, int64_t m1, int64_t R, const float* panel, int64_t ldp,
            const float* bias, float scale, Bits mask, bool add, void* y, Type type, int64_t stride, int64_t width) {
#if FP_ISA >= 3
  if (in_pairs(type, R)) return expand_pairs(s, lds, m0, m1, R, panel, ldp, bias, scale, mask, add, y, stride, width);
#endif
  auto as = type == Type::f32 ? expand_as<Type::f32> : type == Type::bf16 ? expand_as<Type::bf16> : expand_as<Type::f16>;
  as(s, lds, m0, m1, R, panel, ldp, bias, scale, mask, add, y, stride, width);
}

// out[i * ld + j] = src[i, j], of which columns are contiguous.
template <Type T>
void transpose_to(const Strided& src, int64_t rows, int64_t cols, float* out, int64_t ld) {
#if FP_ISA >= 2
  for (int64_t j = 0; j < cols; j += kLanes)
    for (int64_t i = 0; i < rows; i += kLanes) {
      __m512 block[kLanes];
      for (int t = 0; t < kLanes; ++t)
        block[t] = reinterpret_cast<__m512>(j + t < cols ? load_some<T>(src.data, (j + t) * src.col + i, rows - i) : vf{});
      transpose(block);
      for (int64_t t = 0; t < smaller(kLanes, rows - i); ++t) store_some<Type::f32>(out, (i + t) * ld + j, reinterpret_cast<vf>(block[t]), ld - j);
    }
#else
  constexpr int64_t kBlock = 64;  // rows whose lines stay in an L1 cache
  for (int64_t i = 0; i < rows; i += kBlock)
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t k = i; k < smaller(i + kBlock, rows); ++k) out[k * ld + j] = scalar_to_float(src.data, T, k + j * src.col);
#endif
}

template <Type T>
void pack_as(const Strided& src, int64_t rows, int64_t cols, Use use, Type type, float* out, int64_t ld) {
#if FP_ISA >= 3
  const int64_t R = use == Use::reduce ? cols : rows;
  if (in_pairs(type, R))
    return pack_pairs<T>(src, rows, cols, use == Use::reduce && R <= kFoldRank, reinterpret_cast<uint32_t*>(out), ld);
#endif
  if (src.col == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; j += kLanes) store_some<Type::f32>(out, i * ld + j, load_some<T>(src.data, i * src.row + j, cols - j), ld - j);
  } else if (src.row == 1) {
    transpose_to<T>(src, rows, cols, out, ld);
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) out[i * ld + j] = scalar_to_float(src.data, T, i * src.row + j * src.col);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = cols; j < ld; ++j) out[i * ld + j] = 0.0f;
}

void pack(Strided src, int64_t rows, int64_t cols, Use use, Type type, float* out, int64_t ld) {
  auto as = src.type == Type::f32 ? pack_as<Type::f32> : src.type == Type::bf16 ? pack_as<Type::bf16> : pack_as<Type::f16>;
  as(src, rows, cols, use, type, out, ld);
}

template <Type T>
void to_float_as(const void* src, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) store_some<Type::f32>(out, i, load_some<T>(src, i, n - i), n - i);
}

void to_float(const void* src, Type type, int64_t n, float* out) {
  auto as = type == Type::f32 ? to_float_as<Type::f32> : type == Type::bf16 ? to_float_as<Type::bf16> : to_float_as<Type::f16>;
  as(src, n, out);
}

template <Type T>
void from_float_as(const float* src, int64_t n, void* out) {
  for (int64_t i = 0; i < n; i += kLanes) store_some<T>(out, i, load_some<Type::f32>(src, i, n - i), n - i);
}

void from_float(const float* src, int64_t n, void* out, Type type) {
  auto as = type == Type::f32    ? from_float_as<Type::f32>
            : type == Type::bf16 ? from_float_as<Type::bf16>
                                 : from_float_as<Type::f16>;
  as(src, n, out);
}

#ifdef FP_TILES
constexpr FourBitTiles kFourBitTiles = {arrange_forward, tiles_forward, arrange_backward, tiles_backward};
constexpr const FourBitTiles* kTiles = &kFourBitTiles;
constexpr FourBitBytes kFourBitBytes = {byte_room, arrange_bytes, product_bytes};
constexpr const FourBitBytes* kBytes = &kFourBitBytes;
#else
constexpr const FourBitTiles* kTiles = nullptr;
constexpr const FourBitBytes* kBytes = nullptr;
#endif
#if FP_ISA >= 3 && !defined(FP_TILES)
constexpr FourBitBlocks kFourBitBlocks = {arrange_blocks_forward, blocks_forward, arrange_blocks_backward, blocks_backward};
constexpr const FourBitBlocks* kBlocks = &kFourBitBlocks;
#else
constexpr const FourBitBlocks* kBlocks = nullptr;
#endif

constexpr FourBitKernels kFourBit = {encode, decode, absmax, product_in_pairs, few_rows, arrange, product, kTiles, kBytes, kBlocks};

constexpr Kernels kTable = {FP_TABLE, pack, draw, drop, reduce, expand, to_float, from_float, dots, &kFourBit};

}  // namespace
