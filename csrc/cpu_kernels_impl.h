// The kernels of cpu_kernels.h for one instruction set. The including file sets FP_ISA and FP_TABLE, and the target.
//
// Two products make up all of LoRA on a CPU, and one micro-kernel serves both: C[MR][NV vectors] += A · B, with A broadcast
// from thin or strided storage and B read as whole vectors of contiguous rows.
//   reduce: the long dimension is summed (x aᵀ, dy b): A = rows of x, B = the packed panel [K, R].
//   grad:   the rows are summed (dsᵀ x, sᵀ dy): A = s with the rank as its row, B = rows of x as they lie.
//   expand: the rank is summed (s bᵀ, ds a): A = rows of s, B = the packed panel [R, N].
// Compute-bound at rank >= 16: 2R FLOP for each element of x, against 4 bytes read once from memory.
#pragma once
#include "cpu_masks_impl.h"

namespace {

using namespace fastpeft;

#if FP_ISA >= 2  // 32 registers
constexpr int kReduceRows2 = 12, kReduceRows1 = 12, kGradRows = 8, kGradVectors = 2, kExpandRows = 12, kExpandVectors = 2;
#else            // 16 registers: 12 accumulators, 2 or 3 of B, 1 broadcast
constexpr int kReduceRows2 = 6, kReduceRows1 = 12, kGradRows = 4, kGradVectors = 3, kExpandRows = 6, kExpandVectors = 2;
#endif

// The row stride of a block's buffer: 17 cache lines, so that a column of it spreads over all sets of an L1 cache.
constexpr int64_t kLead = kCols + 16;

template <int MR, int NV>
inline void tile(const float* a, int64_t am, int64_t ak, const float* b, int64_t bk, int64_t k, vf (&acc)[MR][NV]) {
  for (int64_t i = 0; i < k; ++i) {
    vf row[NV];
    for (int v = 0; v < NV; ++v) row[v] = load<vf>(b + i * bk + v * kLanes);
    for (int m = 0; m < MR; ++m) {
      const vf x = splat(a[m * am + i * ak]);
      for (int v = 0; v < NV; ++v) acc[m][v] += x * row[v];
    }
  }
}

// c[m, n] (+)= start[n] + sum_k a[m, k] b[k, n] for MR rows and NV vectors. ADD sums its k apart and then adds, so that a
// long sum is one of short sums: the rounding error of 256 terms and not of thousands.
template <int MR, int NV, bool ADD>
inline void block(const float* a, int64_t am, int64_t ak, const float* b, int64_t bk, int64_t k, const float* start,
                  float* c, int64_t ldc) {
  vf acc[MR][NV];
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) acc[m][v] = !ADD && start ? load<vf>(start + v * kLanes) : vf{};
  tile<MR, NV>(a, am, ak, b, bk, k, acc);
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) {
      float* out = c + m * ldc + v * kLanes;
      store(out, ADD ? load<vf>(out) + acc[m][v] : acc[m][v]);
    }
}

// All rows at one width: the full row group, then groups of 4, 2 and 1.
template <int MR, int NV, bool ADD>
inline void rows_of(const float* a, int64_t am, int64_t ak, int64_t rows, const float* b, int64_t bk, int64_t k,
                    const float* start, float* c, int64_t ldc) {
  int64_t m = 0;
  for (; m + MR <= rows; m += MR) block<MR, NV, ADD>(a + m * am, am, ak, b, bk, k, start, c + m * ldc, ldc);
  if constexpr (MR > 4)
    for (; m + 4 <= rows; m += 4) block<4, NV, ADD>(a + m * am, am, ak, b, bk, k, start, c + m * ldc, ldc);
  if constexpr (MR > 2)
    for (; m + 2 <= rows; m += 2) block<2, NV, ADD>(a + m * am, am, ak, b, bk, k, start, c + m * ldc, ldc);
  for (; m < rows; ++m) block<1, NV, ADD>(a + m * am, am, ak, b, bk, k, start, c + m * ldc, ldc);
}

constexpr int64_t vectors(int64_t n) { return (n + kLanes - 1) / kLanes; }

inline void reduce_block(const float* x, int64_t ldx, int64_t rows, int64_t n, const float* panel, int64_t ldp, int64_t R,
                         float* s) {
  int64_t v = 0;
  const int64_t all = vectors(R);
  for (; v + 2 <= all; v += 2)
    rows_of<kReduceRows2, 2, true>(x, ldx, 1, rows, panel + v * kLanes, ldp, n, nullptr, s + v * kLanes, ldp);
  if (v < all)
    rows_of<kReduceRows1, 1, true>(x, ldx, 1, rows, panel + v * kLanes, ldp, n, nullptr, s + v * kLanes, ldp);
}

inline void grad_block(const float* left, int64_t ldl, int64_t R, const float* x, int64_t ldx, int64_t rows, int64_t n,
                       float* grad, int64_t ldg) {
  int64_t v = 0;
  const int64_t all = vectors(n);
  for (; v + kGradVectors <= all; v += kGradVectors)
    rows_of<kGradRows, kGradVectors, true>(left, 1, ldl, R, x + v * kLanes, ldx, rows, nullptr, grad + v * kLanes, ldg);
  for (; v < all; ++v)
    rows_of<kGradRows, 1, true>(left, 1, ldl, R, x + v * kLanes, ldx, rows, nullptr, grad + v * kLanes, ldg);
}

template <Type T>
inline vf load_tail(const void* base, int64_t i, int64_t n) {
  alignas(64) float part[kLanes] = {};
  for (int64_t j = 0; j < n; ++j) part[j] = scalar_to_float(base, T, i + j);
  return load<vf>(part);
}

template <Type T>
inline vf load_some(const void* base, int64_t i, int64_t n) {
  return n >= kLanes ? load_as_float<T>(base, i) : load_tail<T>(base, i, n);
}

template <Type T>
inline void store_some(void* base, int64_t i, vf v, int64_t n) {
  if (n >= kLanes) return store_from_float<T>(base, i, v);
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  alignas(64) unsigned char part[kLanes * 4];
  store_from_float<T>(part, 0, v);
  std::memcpy(static_cast<char*>(base) + i * size, part, static_cast<size_t>(n * size));
}

// The lines of one row of a block, to come from memory while the block before it is computed: the hardware's own
// prefetcher starts anew at every row.
template <Type T>
inline void prefetch(const void* x, int64_t base) {
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  const char* p = static_cast<const char*>(x) + base * size;
  for (int64_t line = 0; line < kCols * size; line += 64) __builtin_prefetch(p + line, 0, 2);
}

// One row of a block of at most 256 columns to fp32, masked; the padding up to a whole vector is zero.
template <Type T>
inline void fetch(const void* x, int64_t base, int64_t n, const uint8_t* bits, float* out) {
  for (int64_t column = 0; column < n; column += kLanes) {
    vf v = load_some<T>(x, base + column, n - column);
    if (bits) v = masked(v, get_bits(bits, column));
    store(out + column, v);
  }
}

// In groups of 16 rows: one running sum over thousands of rows would lose digits.
inline void column_sums(const float* x, int64_t ldx, int64_t rows, int64_t n, float* sums) {
  for (int64_t c = 0; c < n; c += kLanes) {
    vf total = vf{};
    for (int64_t m0 = 0; m0 < rows; m0 += 16) {
      vf part = vf{};
      for (int64_t m = m0; m < smaller(m0 + 16, rows); ++m) part += load<vf>(x + m * ldx + c);
      total += part;
    }
    store(sums + c, load<vf>(sums + c) + total);
  }
}

template <Type T>
void reduce_as(const Rows& x, int64_t m0, int64_t m1, int64_t width, Bits mask, const float* panel, int64_t ldp, int64_t R,
               float* s, const float* left, int64_t ldl, float* grad, int64_t ldg, float* sums) {
  const int64_t rows = m1 - m0;
  // Rows are copied even where they are fp32: at a width of 1024 the addresses of all rows fall on one set of an L1 cache.
  alignas(64) float buffer[kRows * kLead];
  for (int64_t k0 = 0; k0 < width; k0 += kCols) {
    const int64_t n = smaller(kCols, width - k0);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t base = (m0 + m) * x.stride + k0;
      if (k0 + 2 * kCols <= width) prefetch<T>(x.data, base + kCols);
      else if (m1 + m < x.count) prefetch<T>(x.data, (m1 + m) * x.stride);
      fetch<T>(x.data, base, n, mask.row(m, k0), buffer + m * kLead);
    }
    if (s) reduce_block(buffer, kLead, rows, n, panel + k0 * ldp, ldp, R, s);
    if (grad) grad_block(left, ldl, R, buffer, kLead, rows, n, grad + k0, ldg);
    if (sums) column_sums(buffer, kLead, rows, n, sums + k0);
  }
}

void reduce(Rows x, int64_t m0, int64_t m1, int64_t width, Bits mask, const float* panel, int64_t ldp, int64_t R, float* s,
            const float* left, int64_t ldl, float* grad, int64_t ldg, float* sums) {
  if (s) std::memset(s, 0, static_cast<size_t>((m1 - m0) * ldp) * sizeof(float));
  auto as = x.type == Type::f32 ? reduce_as<Type::f32> : x.type == Type::bf16 ? reduce_as<Type::bf16> : reduce_as<Type::f16>;
  as(x, m0, m1, width, mask, panel, ldp, R, s, left, ldl, grad, ldg, sums);
}

template <Type T>
void expand_as(const float* s, int64_t lds, int64_t m0, int64_t m1, int64_t R, const float* panel, int64_t ldp,
               const float* bias, Bits mask, bool add, void* y, int64_t stride, int64_t width) {
  alignas(64) float buffer[kExpandRows * kCols];
  for (int64_t n0 = 0; n0 < width; n0 += kCols) {
    const int64_t n = smaller(kCols, width - n0);
    const bool direct = T == Type::f32 && !mask.data && !add && n % kLanes == 0;
    for (int64_t m = m0; m < m1; m += kExpandRows) {
      const int64_t rows = smaller(kExpandRows, m1 - m);
      float* out = direct ? static_cast<float*>(y) + m * stride + n0 : buffer;
      const int64_t ldo = direct ? stride : kCols;
      int64_t v = 0;
      const int64_t all = vectors(n);
      for (; v + kExpandVectors <= all; v += kExpandVectors) {
        const int64_t c = n0 + v * kLanes;
        rows_of<kExpandRows, kExpandVectors, false>(s + (m - m0) * lds, lds, 1, rows, panel + c, ldp, R,
                                                    bias ? bias + c : nullptr, out + v * kLanes, ldo);
      }
      for (; v < all; ++v) {
        const int64_t c = n0 + v * kLanes;
        rows_of<kExpandRows, 1, false>(s + (m - m0) * lds, lds, 1, rows, panel + c, ldp, R, bias ? bias + c : nullptr,
                                       out + v * kLanes, ldo);
      }
      if (direct) continue;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t base = (m + i) * stride + n0;
        const float* row = buffer + i * kCols;
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
            const float* bias, Bits mask, bool add, void* y, Type type, int64_t stride, int64_t width) {
  auto as = type == Type::f32 ? expand_as<Type::f32> : type == Type::bf16 ? expand_as<Type::bf16> : expand_as<Type::f16>;
  as(s, lds, m0, m1, R, panel, ldp, bias, mask, add, y, stride, width);
}

template <Type T>
void pack_as(const Strided& src, int64_t rows, int64_t cols, float scale, float* out, int64_t ld) {
  // Read along the contiguous dimension: the other one is the transposition of a thin parameter.
  if (src.row == 1 && src.col != 1) {
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = 0; i < rows; ++i) out[i * ld + j] = scale * scalar_to_float(src.data, T, i + j * src.col);
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) out[i * ld + j] = scale * scalar_to_float(src.data, T, i * src.row + j * src.col);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = cols; j < ld; ++j) out[i * ld + j] = 0.0f;
}

void pack(Strided src, int64_t rows, int64_t cols, float scale, float* out, int64_t ld) {
  auto as = src.type == Type::f32 ? pack_as<Type::f32> : src.type == Type::bf16 ? pack_as<Type::bf16> : pack_as<Type::f16>;
  as(src, rows, cols, scale, out, ld);
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

constexpr Kernels kTable = {FP_TABLE, pack, draw, reduce, expand, to_float, from_float};

}  // namespace
