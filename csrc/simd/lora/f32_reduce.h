// reduce of simd/kernels.h in fp32, for x of any type.
//
// All products of LoRA use one micro-kernel: C[MR][NV vectors] += A · B, with A broadcast from thin or strided storage
// and B read as whole vectors of contiguous rows.
//   reduce: the long dimension is summed (x aᵀ, dy b): A = rows of x, B = the packed panel [K, R].
//   grad:   the rows are summed (dsᵀ x, sᵀ dy): A = s with the rank as its row, B = rows of x in place.
//   expand: the rank is summed (s bᵀ, ds a): A = rows of s, B = the packed panel [R, N].
// Compute-bound from rank 16 on: 2R FLOP for every element of x, 4 bytes that are read from memory once.
#pragma once
#include "simd/lora/dropout.h"
#include "simd/lora/microkernel.h"

namespace {

#if FP_ISA >= 2  // 32 registers
constexpr int kReduceRows2 = 12, kReduceRows1 = 12, kGradRows = 8, kGradVectors = 2;
#else  // 16 registers: 12 accumulators, 2 or 3 of B, 1 broadcast
constexpr int kReduceRows2 = 6, kReduceRows1 = 12, kGradRows = 6, kGradVectors = 2;
#endif

// The columns that reduce and grad process at a time, and the row stride of their copy: an odd number of cache lines,
// so that a column spreads over all sets of an L1 cache.
constexpr int64_t kWidth = 128, kLead = kWidth + 16;

// The block that is read next. Its lines are prefetched while the current block is multiplied, some after every tile:
// requested in one burst they would queue, as a core can wait for only a few at a time.
struct Ahead {
  const char* at;        // null: none
  int64_t stride, size;  // bytes: between rows, and of an element
  void fetch(int64_t m0, int64_t rows, int64_t column, int64_t n) const {
    if (!at) return;
    for (int64_t m = m0; m < m0 + rows; ++m)
      for (int64_t byte = column * size; byte < (column + n) * size; byte += 64)
        __builtin_prefetch(at + m * stride + byte, 0, 2);
  }
};

// The rows that are copied at a time: a copy waits for memory while the rows before it are multiplied.
constexpr int64_t kGroup = 12;

// s [m0 : m0 + rows, R] += x [rows, n] panel for a group of rows, n <= kWidth.
inline void reduce_group(const float* x, int64_t ldx, int64_t m0, int64_t rows, int64_t n, const float* panel,
                         int64_t ldp, int64_t R, float* s, const Ahead& ahead) {
  const int64_t all = vectors(R);
  for (int64_t k = 0; k < n; k += kShortSum) {
    const int64_t count = smaller(kShortSum, n - k);
    ahead.fetch(m0, rows, k, count);
    for (int64_t v = 0; v < all; v += 2) {
      const auto some = v + 2 <= all ? rows_of<kReduceRows2, 2, true> : rows_of<kReduceRows1, 1, true>;
      some(x + k, ldx, 1, rows, panel + k * ldp + v * kLanes, ldp, count, nullptr, 1.0f, s + m0 * ldp + v * kLanes,
           ldp);
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

// Converts a row of a block to fp32 and masks it; the padding to a whole vector is zero.
template <Type T>
inline void fetch(const void* x, int64_t base, int64_t n, const uint8_t* bits, float* out) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t column = 0; !bits && column < whole; column += kLanes)
    store(out + column, load_as_float<T>(x, base + column));
  for (int64_t column = bits ? 0 : whole; column < n; column += kLanes) {
    const vf v = load_some<T>(x, base + column, n - column);
    store(out + column, bits ? masked(v, load_bits(bits, column)) : v);
  }
}

// Groups of 16 rows have four sums of their own: a running sum over thousands of rows would lose digits.
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
void reduce_as(const Rows& x, int64_t m0, int64_t m1, int64_t width, Bits mask, const float* panel, int64_t ldp,
               int64_t R, float* s, const float* left, int64_t ldl, float* grad, int64_t ldg, float* sums) {
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  const int64_t rows = m1 - m0;
  alignas(64) float buffer[kRows * kLead];
  for (int64_t k0 = 0; k0 < width; k0 += kWidth) {
    const int64_t n = smaller(kWidth, width - k0);
    const char* block = static_cast<const char*>(x.data) + (m0 * x.stride + k0) * size;
    const Ahead none = {nullptr, 0, 0};
    // The next columns of these rows, or the first columns of the rows after them.
    const Ahead next = {k0 + kWidth < width ? block + kWidth * size
                        : m1 < x.count      ? block + (rows * x.stride - k0) * size
                                            : nullptr,
                        x.stride * size, size};
    // grad reads whole vectors of fp32 in place, once for many ranks. reduce reads them from a copy of a few rows, as
    // at a width of 1024 all rows would share one set of an L1 cache. Other types, and masked x, are copied for both.
    const bool direct = T == Type::f32 && !mask.data && n % kLanes == 0;
    for (int64_t g = 0; g < rows && (s || !direct); g += kGroup) {
      const int64_t group = smaller(kGroup, rows - g);
      float* copy = direct ? buffer : buffer + g * kLead;
      for (int64_t m = 0; m < group; ++m)
        fetch<T>(x.data, (m0 + g + m) * x.stride + k0, n, mask.row(g + m, k0), copy + m * kLead);
      if (s) reduce_group(copy, kLead, g, group, n, panel + k0 * ldp, ldp, R, s, next);
    }
    const float* from = direct ? reinterpret_cast<const float*>(block) : buffer;
    const int64_t ldf = direct ? x.stride : kLead;
    if (grad) grad_block(left, ldl, R, from, ldf, rows, n, grad + k0, ldg, s ? none : next);
    if (sums) column_sums(from, ldf, rows, n, sums + k0);
  }
}

void reduce_f32(const Rows& x, int64_t m0, int64_t m1, int64_t width, Bits mask, const float* panel, int64_t ldp,
                int64_t R, float scale, float* s, const float* left, int64_t ldl, float* grad, int64_t ldg,
                float* sums) {
  auto as = x.type == Type::f32    ? reduce_as<Type::f32>
            : x.type == Type::bf16 ? reduce_as<Type::bf16>
                                   : reduce_as<Type::f16>;
  as(x, m0, m1, width, mask, panel, ldp, R, s, left, ldl, grad, ldg, sums);
  const int64_t count = (m1 - m0) * ldp;
  for (int64_t i = 0; s && scale != 1.0f && i < count; i += kLanes) store(s + i, scale * load<vf>(s + i));
}

}  // namespace
