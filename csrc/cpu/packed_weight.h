// A quantised weight as the operators receive it; the format is in shared/fourbit.h.
#pragma once
#include <string>
#include <vector>

#include "host/tensor.h"
#include "simd/fourbit_kernels.h"

namespace fastpeft {

inline FourBit fourbit_of(const std::string& quant_type) { return quant_type == "nf4" ? FourBit::nf4 : FourBit::fp4; }

// scales: [absmax], or [codes, code, scale, offset].
inline Packed packed_of(const Tensor& packed, const std::vector<Tensor>& scales, const std::string& quant_type,
                        int64_t block_size) {
  const auto f32 = [&](size_t i) { return static_cast<const float*>(scales[i].const_data_ptr()); };
  const Absmax absmax = scales.size() == 1 ? Absmax{f32(0), nullptr, nullptr, nullptr, 0.0f}
                                           : Absmax{nullptr, static_cast<const uint8_t*>(scales[0].const_data_ptr()),
                                                    f32(1), f32(2), *f32(3)};
  return {static_cast<const uint8_t*>(packed.const_data_ptr()), absmax, fourbit_of(quant_type), block_size};
}

inline const FourBitKernels& four_bit() { return *kernels().four_bit; }

}  // namespace fastpeft
