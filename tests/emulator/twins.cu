// Each PTX wrapper of fp_cuda.h, on small integers, whose sums are exact. The same file runs on a GPU, which `make gpu`
// asks for the words that the twins have to give (golden.py).
#include "cuda/fp_cuda.h"

namespace {

constexpr int kLoads = 0, kMatrices = 96, kCopies = 480, kProducts = 608,
              kBarriers = 736;  // where the words of each begin

// `in`: 512 words, which are 64 rows of 8 values of T. `out`: 800 words. Two warps; but for the barriers, the second
// waits.
template <class T>
__global__ void vectors(const uint32_t* in, uint32_t* out) {
  FP_DYNAMIC_SHARED(uint32_t, shared);
  uint32_t *copied = shared + 512, *flags = copied + 128;
  const int thread = threadIdx.x, lane = thread & 31;
  for (int i = thread; i < 512; i += 64) shared[i] = in[i];
  for (int i = thread; i < 128; i += 64) copied[i] = 0xffffffffu;
  __syncthreads();
  if (thread < 32) {
    out[kLoads + lane] = ptx::load_stream(in + lane);
    const uint2 pair = ptx::load_stream(reinterpret_cast<const uint2*>(in) + lane);
    out[kLoads + 32 + 2 * lane] = pair.x;
    out[kLoads + 33 + 2 * lane] = pair.y;

    const uint32_t *row4 = shared + lane * 5 % 32 * 4, *row2 = shared + lane * 3 % 16 * 4;
    uint32_t r[12];
    ptx::ldmatrix<4, false>(reinterpret_cast<uint32_t (&)[4]>(r[0]), row4);
    ptx::ldmatrix<4, true>(reinterpret_cast<uint32_t (&)[4]>(r[4]), row4);
    ptx::ldmatrix<2, false>(reinterpret_cast<uint32_t (&)[2]>(r[8]), row2);
    ptx::ldmatrix<2, true>(reinterpret_cast<uint32_t (&)[2]>(r[10]), row2);
    for (int i = 0; i < 12; ++i) out[kMatrices + 12 * lane + i] = r[i];

    ptx::cp_async16(copied + 4 * lane, in + 4 * lane, lane % 17);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) out[kCopies + 4 * lane + i] = copied[4 * lane + i];

    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = static_cast<float>(4 * lane + i);
    const uint32_t* own = in + 6 * lane;
    ptx::mma_m16n8k16<T>(sums, own[0], own[1], own[2], own[3], own[4], own[5]);
    for (int i = 0; i < 4; ++i) reinterpret_cast<float*>(out)[kProducts + 4 * lane + i] = sums[i];

    ptx::bar_sync(1, 64);
    out[kBarriers + lane] = flags[31 - lane];
    flags[32 + lane] = in[lane] + 7;
    ptx::bar_arrive(2, 64);
  } else {
    flags[lane] = in[lane] + 5;
    ptx::bar_arrive(1, 64);
    ptx::bar_sync(2, 64);
    out[kBarriers + 32 + lane] = flags[63 - lane];
  }
}

// c [16, 8] = a [16, 16] b [16, 8], through cp.async and ldmatrix, as the kernels use them.
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

extern "C" int twin_vectors(int half, const void* in, void* out) {
  const auto kernel = half ? vectors<__half> : vectors<__nv_bfloat16>;
  return FP_LAUNCH(kernel, 1, 64, (512 + 128 + 64) * 4, nullptr, static_cast<const uint32_t*>(in),
                   static_cast<uint32_t*>(out));
}

extern "C" int twin_product(int half, const void* a, const void* b, float* c) {
  if (half)
    return FP_LAUNCH(product<__half>, 1, 32, 768, nullptr, static_cast<const __half*>(a), static_cast<const __half*>(b),
                     c);
  return FP_LAUNCH(product<__nv_bfloat16>, 1, 32, 768, nullptr, static_cast<const __nv_bfloat16*>(a),
                   static_cast<const __nv_bfloat16*>(b), c);
}
