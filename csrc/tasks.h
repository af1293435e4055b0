// What the LoRA operators on the CPU share: packed parameters, tasks on torch's thread pool, partial sums.
//
// Work is cut into tasks by shape alone, and partial sums are added in the order of the tasks, so that the bytes of what these
// kernels compute do not depend on the number of threads. Those of the vendor GEMM may: its sums are cut as it sees fit.
#pragma once
#include <algorithm>

#include "dropout.h"
#include "tensor.h"

namespace fastpeft {

using std::optional;

struct Mask {
  Dropout drop;
  float factor;  // 1 / keep
};

inline Mask mask_of(double p, const optional<Tensor>& seed) {
  const uint32_t threshold = seed ? dropout_threshold(p) : 0;
  const uint64_t key = threshold ? static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr())) : 0;
  return {{threshold, key}, 65536.0f / static_cast<float>(65536 - threshold)};
}

// The keep mask of one block of rows, drawn once and used by every pass over the block.
struct BlockMask {
  BlockMask(const Mask& mask, int64_t width)
      : drop(mask.drop), width(width), ld((width + kCols - 1) / kCols * (kCols / 8)),
        data(drop.threshold ? new uint8_t[static_cast<size_t>(kRows * ld)] : nullptr) {}
  Bits of(int64_t m0, int64_t m1) {
    if (data) kernels().draw(drop, m0, m1, width, data.get(), ld);
    return {data.get(), ld};
  }
  const Dropout drop;
  const int64_t width, ld;
  const std::unique_ptr<uint8_t[]> data;
};

constexpr Bits kAll = {nullptr, 0};

// A thin parameter, or the transpose of one, [rows, cols] as a kernel wants it beside x, dy or y of `type`.
struct Panel {
  Panel(Strided src, int64_t rows, int64_t cols, Use use, Type type)
      : ld(use == Use::expand ? spread_out(cols) : padded(cols)), data(rows * ld) {
    kernels().pack(src, rows, cols, use, type, data, ld);
  }
  int64_t ld;
  Scratch data;
};

// The row ranges of the tasks: multiples of kRows, at most 16, each worth its partial sums.
struct Tasks {
  explicit Tasks(int64_t rows)
      : M(rows), count(std::clamp<int64_t>(rows / (2 * kRows), 1, 16)), blocks((rows + kRows - 1) / kRows) {}
  int64_t begin(int64_t task) const { return std::min(M, blocks * task / count * kRows); }
  int64_t M, count, blocks;
};

template <class F>
void for_blocks(int64_t begin, int64_t end, F f) {
  for (int64_t m = begin; m < end; m += kRows) f(m, std::min(m + kRows, end));
}

template <class F>
void parallel(int64_t count, F f) {
  if (count == 1) return f(0, 1);
  torch::stable::parallel_for(0, count, 1, f);
}

template <class F>
void parallel_rows(int64_t M, F f) {
  const int64_t blocks = (M + kRows - 1) / kRows;
  if (blocks == 0) return;
  parallel(blocks, [&](int64_t begin, int64_t end) { for_blocks(begin * kRows, std::min(end * kRows, M), f); });
}

// Rows of fp32 [rows, ld] to a contiguous [M, R] tensor, from row m0 on.
inline void put_rows(const float* s, int64_t ld, int64_t m0, int64_t rows, int64_t R, void* out, Type type) {
  for (int64_t m = 0; m < rows; ++m)
    kernels().from_float(s + m * ld, R, static_cast<char*>(out) + (m0 + m) * R * size_of(type), type);
}

inline void get_rows(const Tensor& s, int64_t m0, int64_t rows, float* out, int64_t ld) {
  const Type type = type_of(s);
  const int64_t R = s.size(1);
  for (int64_t m = 0; m < rows; ++m)
    kernels().to_float(static_cast<const char*>(s.const_data_ptr()) + (m0 + m) * s.stride(0) * size_of(type), type, R,
                       out + m * ld);
}

// bias + scale · lora_bias in fp32, padded; null where neither is given.
inline std::unique_ptr<Scratch> start_row(const optional<Tensor>& bias, const optional<Tensor>& lora_bias, int64_t N, float scale) {
  if (!bias && !lora_bias) return nullptr;
  auto row = std::make_unique<Scratch>(padded(N));
  Scratch other(padded(N));
  std::fill(row->data, row->data + padded(N), 0.0f);
  for (const auto& [given, factor] : {std::pair(&bias, 1.0f), std::pair(&lora_bias, scale)}) {
    if (!*given) continue;
    const Tensor t = readable(**given);
    kernels().pack({t.const_data_ptr(), type_of(t), 0, t.stride(0)}, 1, N, Use::expand, Type::f32, other, padded(N));
    for (int64_t n = 0; n < N; ++n) (*row)[n] += factor * other[n];
  }
  return row;
}

// The partial sums [count, rows, ld] of the tasks, added in order, to a contiguous tensor [rows, cols] (or [cols, rows]).
struct Partials {
  Partials(int64_t count, int64_t rows, int64_t cols)
      : count(count), rows(rows), cols(cols), ld(spread_out(cols)), data(count * rows * ld) {}
  float* clear(int64_t task) {
    float* own = data + task * rows * ld;
    std::fill(own, own + rows * ld, 0.0f);
    return own;
  }
  // Zero where a bit of ``mask`` [rows, ceil(cols / 8)] is, which is of ``data`` and not of a transposed out.
  void finish(const Tensor& out, float factor, bool transposed, const optional<Tensor>& mask = std::nullopt) {
    float* total = data;
    for (int64_t task = 1; task < count; ++task) {
      const float* part = data + task * rows * ld;
      for (int64_t i = 0; i < rows * ld; ++i) total[i] += part[i];
    }
    const bool direct = has_kernels(out.scalar_type());
    const Tensor target =
        direct ? out : torch::stable::new_empty(out, out.sizes(), std::make_optional(ScalarType::Float));
    if (factor != 1.0f)
      for (int64_t i = 0; i < rows * ld; ++i) total[i] *= factor;
    if (mask) {
      const auto* bits = static_cast<const uint8_t*>(mask->const_data_ptr());
      for (int64_t row = 0; row < rows; ++row, bits += (cols + 7) / 8)
        for (int64_t col = 0; col < cols; ++col)
          if (!(bits[col / 8] >> col % 8 & 1)) total[row * ld + col] = 0.0f;
    }
    if (!transposed) {
      put_rows(total, ld, 0, rows, cols, target.mutable_data_ptr(), type_of(target));
    } else if (type_of(target) == Type::f32) {
      turn(total, static_cast<float*>(target.mutable_data_ptr()));
    } else {
      Scratch turned(cols * rows);
      turn(total, turned);
      kernels().from_float(turned, cols * rows, target.mutable_data_ptr(), type_of(target));
    }
    if (!direct) {
      Tensor wide = out;
      torch::stable::copy_(wide, target);
    }
  }
  // [rows, ld] to a contiguous [cols, rows].
  void turn(const float* from, float* to) const {
    kernels().pack({from, Type::f32, 1, ld}, cols, rows, Use::expand, Type::f32, to, rows);
  }
  int64_t count, rows, cols, ld;
  Scratch data;
};

inline void shrink_rows(const Tensor& x, const Panel& panel, const Mask& mask, int64_t R, int64_t m0, int64_t m1, float* s) {
  BlockMask bits(mask, x.size(1));
  kernels().reduce(rows_of(x), m0, m1, x.size(1), bits.of(m0, m1), panel.data, panel.ld, R, mask.factor, s,
                   nullptr, 0, nullptr, 0, nullptr);
}

}  // namespace fastpeft
