// expand of simd/kernels.h in fp32, for y of any type.
#pragma once
#include "simd/lora/dropout.h"
#include "simd/lora/microkernel.h"

namespace {

constexpr int kExpandRows = 6, kExpandVectors = FP_ISA >= 2 ? 4 : 2;  // for 32 registers, or 16

// out [rows, n] = bias + scale * s b.
inline void expand_block(const float* s, int64_t lds, int64_t rows, const float* panel, int64_t ldp, int64_t R,
                         const float* bias, float scale, float* out, int64_t ldo, int64_t n) {
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

// The floats of a panel for a block of columns. If fp32 is written in place, blocks are as wide as a cache allows, so
// that whole rows are written in the order of their addresses.
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
          if (bits) value = masked(value, load_bits(bits, column));
          if (add) value += load_some<T>(y, base + column, n - column);
          store_some<T>(y, base + column, value, n - column);
        }
      }
    }
  }
}

void expand_f32(const float* s, int64_t lds, int64_t m0, int64_t m1, int64_t R, const float* panel, int64_t ldp,
                const float* bias, float scale, Bits mask, bool add, void* y, Type type, int64_t stride,
                int64_t width) {
  auto as = type == Type::f32    ? expand_as<Type::f32>
            : type == Type::bf16 ? expand_as<Type::bf16>
                                 : expand_as<Type::f16>;
  as(s, lds, m0, m1, R, panel, ldp, bias, scale, mask, add, y, stride, width);
}

}  // namespace
