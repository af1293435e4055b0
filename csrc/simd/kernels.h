// The CPU kernels of the LoRA primitives as a table of function pointers, one table for each instruction set.
//
// Letters as everywhere: x [M,K], a [R,K], b [N,R], s [M,R], y and dy [M,N]. Rows of x, dy, y, dx are contiguous in
// their last dimension; the caller packs a and b (`pack`), the summed dimension first (`panel`). All sums are in fp32.
#pragma once
#include <cstdint>

namespace fastpeft {

enum class Type : int { f32, bf16, f16 };

// The rows that a task processes at a time: enough to load and store the accumulators of a weight gradient rarely, few
// enough for a block of 256 fp32 columns to stay in a 512 KiB L2 beside its operands.
constexpr int64_t kRows = 96;
// The columns of a block of work; a row of keep bits fills whole blocks.
constexpr int64_t kCols = 256;
// Packed panels are padded to this many floats: one AVX-512 vector.
constexpr int64_t kPad = 16;

constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }
// A row stride for n floats that is an odd number of cache lines: with 4096 bytes all rows would share one set of an
// L1.
constexpr int64_t spread_out(int64_t n) { return padded(n) | kPad; }

struct Rows {  // [M, width], last dimension contiguous
  const void* data;
  Type type;
  int64_t stride;  // elements between rows
  int64_t count;   // M
};

struct Dropout {  // threshold 0: none
  uint32_t threshold;
  uint64_t seed;
};

struct Bits {  // a keep mask for a task's rows: bit (column % 8) of byte column / 8; null keeps everything
  const uint8_t* data;
  int64_t ld;  // bytes between rows
  const uint8_t* row(int64_t m, int64_t column) const { return data ? data + m * ld + column / 8 : nullptr; }
};

struct Strided {  // any strides, for the thin parameters
  const void* data;
  Type type;
  int64_t row, col;  // elements
};

// The kernel that a panel is packed for: [width, R] for reduce, [R, width] for expand.
enum class Use : int { reduce, expand };

struct FourBitKernels;  // fourbit_kernels.h

struct Kernels {
  const char* name;

  // src [rows, cols] to a panel for a kernel that reads or writes `type`: out[i * ld + j] = src[i, j] in fp32, zero up
  // to ld. Kernels that multiply pairs of bf16 have their own format, lora/bf16_pack.h, of at most the same size.
  void (*pack)(Strided src, int64_t rows, int64_t cols, Use use, Type type, float* out, int64_t ld);

  // The keep mask of rows [m0, m1) to `bits`, row m0 first, ld bytes apart; ld is a multiple of kCols / 8 and covers
  // width.
  void (*draw)(Dropout drop, int64_t m0, int64_t m1, int64_t width, uint8_t* bits, int64_t ld);

  // out[m - m0, k] = scale * mask(x)[m, k] in x's type; with `add`, += the same. Rows of out are `stride` elements
  // apart.
  void (*drop)(Rows x, int64_t m0, int64_t m1, int64_t width, Bits mask, float scale, bool add, void* out,
               int64_t stride);

  // s[m, 0:R] = scale * sum_k mask(x)[m, k] * panel[k, 0:R] for m in [m0, m1): shrink with panel = aᵀ, ds with panel =
  // b; `s` is fp32 [rows, ldp] of this task with row m0 first, or null; ldp = padded(R). If `grad` is not null, the
  // same read of x adds grad[r, k] += left[m, r] * mask(x)[m, k] for r < R (fp32 [R, ldg]). If `sums` is not null, it
  // adds sums[k] += mask(x)[m, k]. ldg and `sums` have at least padded(width) floats.
  void (*reduce)(Rows x, int64_t m0, int64_t m1, int64_t width, Bits mask, const float* panel, int64_t ldp, int64_t R,
                 float scale, float* s, const float* left, int64_t ldl, float* grad, int64_t ldg, float* sums);

  // y[m, n] = mask(bias[n] + scale * sum_r s[m, r] * panel[r, n]); with `add`, y += the same. s fp32 [rows, lds] of
  // this task, panel fp32 [R, ldp], bias fp32 [padded(width)] or null, ldp >= padded(width).
  void (*expand)(const float* s, int64_t lds, int64_t m0, int64_t m1, int64_t R, const float* panel, int64_t ldp,
                 const float* bias, float scale, Bits mask, bool add, void* y, Type type, int64_t stride,
                 int64_t width);

  // Convert n values.
  void (*to_float)(const void* src, Type type, int64_t n, float* out);
  void (*from_float)(const float* src, int64_t n, void* out, Type type);

  // out[m * ldo + i] = sum_k a[i, k] * x[m, k] for all rows of a and M rows of x; x is fp32, and zero from width up to
  // ldx.
  void (*dots)(Rows a, int64_t width, const float* x, int64_t ldx, int64_t M, float* out, int64_t ldo);

  const FourBitKernels* four_bit;
};

// The table in use: the best that this processor runs, or the one that set_isa (dispatch.h) named.
const Kernels& kernels();

}  // namespace fastpeft
