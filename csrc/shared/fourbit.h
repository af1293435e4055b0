// The arithmetic of 4-bit weights, the same in every kernel on a CPU and on a GPU.
//
// Format (that of bitsandbytes): the weight [N, K] as one row-major run of n values, two to a byte, the first in the
// high nibble; blocks of block_size consecutive values share an fp32 absmax, and w = code[nibble] · absmax. Doubly
// quantised, absmax[i] = code8[q[i]] · scale[i / 256] + offset, rounded after the product and after the sum. NF4:
// Dettmers et al. 2023, arXiv:2305.14314, appendix E.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FP_HOST_DEVICE inline
#endif

namespace fastpeft {

enum class FourBit : int { nf4, fp4 };

// The number of absmax values that share an fp32 scale when absmax is quantised itself.
constexpr int64_t kNestedBlock = 256;

// The code tables are macros because constant arrays are declared differently on a GPU (__constant__) and a CPU
// (constexpr).
#define FP_NF4_CODE                                                                                   \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,    \
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, \
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f
// Index order, index 8 is -0: sign, then 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4.
#define FP_FP4_CODE                                                                                                   \
  0.0f, 0.005208333333333333f, 0.6666666666666666f, 1.0f, 0.3333333333333333f, 0.5f, 0.16666666666666666f, 0.25f,     \
      -0.0f, -0.005208333333333333f, -0.6666666666666666f, -1.0f, -0.3333333333333333f, -0.5f, -0.16666666666666666f, \
      -0.25f

}  // namespace fastpeft
