// Each PTX wrapper of fp_cuda.h once, on small integers, whose sums are exact: the same file runs on a GPU.
#include "fp_cuda.h"

namespace {

// c [16, 8] = a [16, 16] b [16, 8], through cp.async and ldmatrix.
template <class T>
__global__ void product(const T* a, const T* b, float* c) {
  FP_DYNAMIC_SHARED(T, shared);
  const int lane = threadIdx.x, g = lane >> 2, t = lane & 3;
  T* shared_b = shared + 256;
  ptx::cp_async16(shared + lane * 8, a + lane * 8);
  if (lane < 16) ptx::cp_async16(shared_b + lane * 8, b + lane * 8);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[2];
  ptx::ldmatrix<4, false>(fragment_a, shared + (lane & 15) * 16 + (lane >> 4) * 8);
  ptx::ldmatrix<2, true>(fragment_b, shared_b + (lane & 15) * 8);
  float sums[4] = {};
  ptx::mma_m16n8k16<T>(sums, fragment_a[0], fragment_a[1], fragment_a[2], fragment_a[3], fragment_b[0], fragment_b[1]);
  for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * t + (i & 1)] = sums[i];
}

}  // namespace

extern "C" int twin_product(int half, const void* a, const void* b, float* c) {
  if (half)
    return FP_LAUNCH(product<__half>, 1, 32, 768, nullptr, static_cast<const __half*>(a), static_cast<const __half*>(b), c);
  return FP_LAUNCH(product<__nv_bfloat16>, 1, 32, 768, nullptr, static_cast<const __nv_bfloat16*>(a),
                   static_cast<const __nv_bfloat16*>(b), c);
}
