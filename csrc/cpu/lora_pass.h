// What one pass of LoRA's kernels over rows of x or dy needs: a keep mask, packed parameters, partial sums.
#pragma once
#include "host/tasks.h"
#include "shared/dropout.h"

namespace fastpeft {

struct Mask {
  Dropout drop;
  float factor;  // 1 / keep
};

inline Mask mask_of(double p, const optional<Tensor>& seed) {
  const uint32_t threshold = seed ? dropout_threshold(p) : 0;
  const uint64_t key = threshold ? static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr())) : 0;
  return {{threshold, key}, static_cast<float>(kDraws) / static_cast<float>(kDraws - threshold)};
}

// The keep mask of a block of rows, drawn once for all passes over the block.
struct BlockMask {
  BlockMask(const Mask& mask, int64_t width)
      : drop(mask.drop),
        width(width),
        ld((width + kCols - 1) / kCols * (kCols / 8)),
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

// A thin parameter [rows, cols], or the transpose of one, packed for a kernel that reads or writes x, dy or y of
// `type`.
struct Panel {
  Panel(Strided src, int64_t rows, int64_t cols, Use use, Type type)
      : ld(use == Use::expand ? spread_out(cols) : padded(cols)), data(rows * ld) {
    kernels().pack(src, rows, cols, use, type, data, ld);
  }
  int64_t ld;
  Scratch data;
};

// bias + scale · lora_bias in fp32, padded; null if neither is given.
inline std::unique_ptr<Scratch> start_row(const optional<Tensor>& bias, const optional<Tensor>& lora_bias, int64_t N,
                                          float scale) {
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

// Partial sums of the tasks, [count, rows, ld], added in task order to a contiguous tensor [rows, cols] or [cols,
// rows].
struct Partials {
  Partials(int64_t count, int64_t rows, int64_t cols)
      : count(count), rows(rows), cols(cols), ld(spread_out(cols)), data(count * rows * ld) {}
  float* clear(int64_t task) {
    float* part = data + task * rows * ld;
    std::fill(part, part + rows * ld, 0.0f);
    return part;
  }
  // Elements whose bit in `mask` [rows, ceil(cols / 8)] is 0 become zero. The mask has the order of `data`, also if
  // `out` is transposed.
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
      store_rows(total, ld, 0, rows, cols, target.mutable_data_ptr(), type_of(target));
    } else if (type_of(target) == Type::f32) {
      transpose(total, static_cast<float*>(target.mutable_data_ptr()));
    } else {
      Scratch by_columns(cols * rows);
      transpose(total, by_columns);
      kernels().from_float(by_columns, cols * rows, target.mutable_data_ptr(), type_of(target));
    }
    if (!direct) {
      Tensor wide = out;
      torch::stable::copy_(wide, target);
    }
  }
  // [rows, ld] to a contiguous [cols, rows].
  void transpose(const float* from, float* to) const {
    kernels().pack({from, Type::f32, 1, ld}, cols, rows, Use::expand, Type::f32, to, rows);
  }
  int64_t count, rows, cols, ld;
  Scratch data;
};

inline void shrink_rows(const Tensor& x, const Panel& panel, const Mask& mask, int64_t R, int64_t m0, int64_t m1,
                        float* s) {
  BlockMask bits(mask, x.size(1));
  kernels().reduce(rows_of(x), m0, m1, x.size(1), bits.of(m0, m1), panel.data, panel.ld, R, mask.factor, s, nullptr, 0,
                   nullptr, 0, nullptr);
}

}  // namespace fastpeft
