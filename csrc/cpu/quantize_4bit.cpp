// quantize_4bit and quantize_absmax on the CPU.
//
// Signatures and meaning: fastpeft/reference/quantize_4bit.py.
#include <cmath>

#include "cpu/packed_weight.h"
#include "host/tasks.h"

namespace fastpeft {
namespace {

constexpr int64_t kTaskValues = 1 << 16;

std::tuple<Tensor, Tensor> quantize_4bit(Tensor w, std::string quant_type, int64_t block_size) {
  const Tensor values = readable(w);
  const int64_t n = values.numel(), blocks = (n + block_size - 1) / block_size;
  Tensor packed = empty({(n + 1) / 2}, ScalarType::Byte), absmax = empty({blocks}, ScalarType::Float);
  if (n == 0) return {packed, absmax};
  const void* data = values.const_data_ptr();
  const Type type = type_of(values);
  const FourBit to = fourbit_of(quant_type);
  uint8_t* nibbles = static_cast<uint8_t*>(packed.mutable_data_ptr());
  float* maxima = static_cast<float*>(absmax.mutable_data_ptr());
  const int64_t grain = kTaskValues / block_size;
  parallel((blocks + grain - 1) / grain, [&](int64_t first, int64_t last) {
    four_bit().encode(data, type, n, to, block_size, first * grain, std::min(last * grain, blocks), nibbles, maxima);
  });
  return {packed, absmax};
}

// The nearest code of 65536 points over [-1, 1]; a value is rounded to a point first.
constexpr int kPoints = 1 << 16;

std::unique_ptr<uint8_t[]> nearest(const float* code) {
  std::unique_ptr<uint8_t[]> table(new uint8_t[kPoints]);
  int c = 0;
  for (int i = 0; i < kPoints; ++i) {
    const float point = static_cast<float>(i + i) / 65535.0f - 1.0f;
    while (c < 255 && point > (code[c] + code[c + 1]) * 0.5f) ++c;
    table[i] = static_cast<uint8_t>(c);
  }
  return table;
}

std::tuple<Tensor, Tensor> quantize_absmax(Tensor values, Tensor code) {
  const int64_t n = values.numel(), blocks = (n + kNestedBlock - 1) / kNestedBlock;
  Tensor codes = empty({n}, ScalarType::Byte), scales = empty({blocks}, ScalarType::Float);
  const float* data = static_cast<const float*>(values.const_data_ptr());
  uint8_t* out = static_cast<uint8_t*>(codes.mutable_data_ptr());
  float* scale = static_cast<float*>(scales.mutable_data_ptr());
  const auto table = nearest(static_cast<const float*>(code.const_data_ptr()));
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = std::min(n, (b + 1) * kNestedBlock);
    float max = 0.0f;  // a NaN is skipped
    for (int64_t i = b * kNestedBlock; i < end; ++i) max = std::fabs(data[i]) > max ? std::fabs(data[i]) : max;
    scale[b] = max;
    const float inverse = 1.0f / max;
    for (int64_t i = b * kNestedBlock; i < end; ++i) {
      const float unit = std::clamp(data[i] * inverse, -1.0f, 1.0f);
      // The product is exact in fp64, so the result is rounded once, as by an fma. A NaN and a block of zeros get code
      // 0.
      const float point = static_cast<float>(static_cast<double>((unit + 1.0f) * 0.5f) * 65535.0 + 0.5);
      out[i] = max > 0.0f && point == point ? table[static_cast<int>(point)] : uint8_t{0};
    }
  }
  return {codes, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) {
  m.impl("quantize_4bit", TORCH_BOX(&quantize_4bit));
  m.impl("quantize_absmax", TORCH_BOX(&quantize_absmax));
}

}  // namespace fastpeft
