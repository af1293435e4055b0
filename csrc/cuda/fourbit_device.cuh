// Shared by the kernels on 4-bit weights: the code tables, the absmax of a block, and values of any dtype.
#pragma once
#include "cuda/fp_cuda.h"
#include "cuda/launchers.h"
#include "shared/fourbit.h"

namespace fastpeft {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __constant__ const float kCodes[2][16] = {{FP_NF4_CODE}, {FP_FP4_CODE}};

// The weight as a kernel takes it, by value.
struct Weight4bit {
  const uint8_t* packed;
  const float* absmax;
  const uint8_t* codes;
  const float* code;
  const float* scale;
  const float* offset;
  int quant_type;
  int log2_block;
};

inline bool valid(const fp_weight4bit& w) {
  const bool nested = w.codes && w.code && w.scale && w.offset;
  return w.packed && (nested || w.absmax) && (w.quant_type == 0 || w.quant_type == 1) && w.block_size >= 32 &&
         w.block_size <= 4096 && !(w.block_size & (w.block_size - 1));
}

inline Weight4bit as_argument(const fp_weight4bit& w) {
  int log2_block = 0;
  while ((1 << log2_block) < w.block_size) ++log2_block;
  return {
      static_cast<const uint8_t*>(w.packed), w.absmax, w.codes, w.code, w.scale, w.offset, w.quant_type, log2_block};
}

inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// A block's absmax, in two steps: `fetch` issues the loads, `value` needs their results.
struct BlockScale {
  float factor;   // the absmax itself, or the scale of its 256
  uint8_t index;  // into the nested code

  template <class Index>  // 32 bits if they suffice, as registers limit the matrix kernels
  __device__ __forceinline__ void fetch(const Weight4bit& w, Index block) {
    factor = w.codes ? ptx::load(w.scale + block / static_cast<Index>(kNestedBlock)) : ptx::load(w.absmax + block);
    index = w.codes ? ptx::load(w.codes + block) : 0;
  }
  // Two roundings, as where bitsandbytes dequantises absmax and then adds the offset.
  __device__ __forceinline__ float value(const Weight4bit& w, const float* code, float offset) const {
    return w.codes ? __fadd_rn(__fmul_rn(code[index], factor), offset) : factor;
  }
};

template <class T>
__device__ __forceinline__ T from_f32(float value);
template <>
__device__ __forceinline__ float from_f32<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ f16 from_f32<f16>(float value) {
  return __float2half_rn(value);
}

__device__ __forceinline__ float to_f32(float value) { return value; }
__device__ __forceinline__ float to_f32(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_f32(f16 value) { return __half2float(value); }

// Two values in one register, `first` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pair_of(float first, float second) {
  if constexpr (std::is_same_v<T, f16>) {
    const __half2_raw pair = __floats2half2_rn(first, second);
    return static_cast<uint32_t>(pair.x) | static_cast<uint32_t>(pair.y) << 16;
  } else {
    const __nv_bfloat162_raw pair = __floats2bfloat162_rn(first, second);
    return static_cast<uint32_t>(pair.x) | static_cast<uint32_t>(pair.y) << 16;
  }
}

// An operand whose type is known only when the kernel runs: for the thin matrices, never for a weight.
struct AnyMatrix {
  const void* data;
  int64_t stride;
  int type;

  __device__ __forceinline__ float at(int64_t row, int64_t column) const {
    const int64_t i = row * stride + column;
    if (type == 0) return ptx::load(static_cast<const float*>(data) + i);
    if (type == 1) return to_f32(ptx::load(static_cast<const bf16*>(data) + i));
    return to_f32(ptx::load(static_cast<const f16*>(data) + i));
  }
};

inline AnyMatrix as_argument(const fp_matrix* m) {
  return m ? AnyMatrix{m->data, m->stride, m->type} : AnyMatrix{nullptr, 0, 0};
}

}  // namespace fastpeft
