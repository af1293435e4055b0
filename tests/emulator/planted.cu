// Kernels with one mistake each, and with -DMENDED without it: what the emulator and the sanitizers must find.
//
//   planted NAME    runs one kernel and prints the values it wrote; exit 1 where the launch failed
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "cuda/fp_cuda.h"

#ifdef MENDED
#define ONLY_MENDED(statement) statement
#else
#define ONLY_MENDED(statement)
#endif

__global__ void missing_syncthreads(const float* x, float* y) {
  FP_SHARED(float, s, [256]);
  const int t = threadIdx.x;
  s[t] = x[t];
  ONLY_MENDED(__syncthreads();)
  y[t] = s[255 - t];
}

__global__ void missing_barrier_at_loop_end(const float* x, float* y) {
  FP_SHARED(float, s, [256]);
  const int t = threadIdx.x;
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    s[t] = x[i * 256 + t];
    __syncthreads();
    sum += s[255 - t];
    ONLY_MENDED(__syncthreads();)
  }
  y[t] = sum;
}

__global__ void missing_syncwarp(const float* x, float* y) {
  FP_SHARED(float, s, [256]);
  const int t = threadIdx.x;
  s[t] = x[t];
  ONLY_MENDED(__syncwarp();)
  y[t] = s[t ^ 1];
}

__global__ void shuffle_as_fence(const float* x, float* y) {
  FP_SHARED(float, s, [256]);
  const int t = threadIdx.x;
  s[t] = x[t];
  const int zero = __shfl_sync(~0u, t, 0) & 0;
  ONLY_MENDED(__syncwarp();)
  y[t] = s[t ^ 31] + zero;
}

__global__ void missing_barrier_after_copy(const float* x, float* y) {
  FP_DYNAMIC_SHARED(float, s);
  const int t = threadIdx.x;
  ptx::cp_async16(s + 4 * t, x + 4 * t);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ONLY_MENDED(__syncthreads();)
  y[t] = s[1023 - 4 * t];
}

__global__ void missing_copy_wait(const float* x, float* y) {
  FP_DYNAMIC_SHARED(float, s);
  const int t = threadIdx.x;
  ptx::cp_async16(s + 4 * t, x + 4 * t);
  ptx::cp_async_commit();
  ONLY_MENDED(ptx::cp_async_wait<0>();)
  __syncthreads();
  y[t] = s[1023 - 4 * t];
}

__global__ void two_blocks_add(const float*, float* y) {
#ifdef MENDED
  if (threadIdx.x == 0) atomicAdd(y, 1.0f);
#else
  if (threadIdx.x == 0) *y += 1.0f;
#endif
}

// A producer and a consumer at a named barrier: right as it stands, and so with -DMENDED.
__global__ void named_barrier(const float* x, float* y) {
  FP_SHARED(float, s, [128]);
  const int t = threadIdx.x;
  if (t < 128) {
    s[t] = x[t];
    ptx::bar_arrive(1, 256);
  } else {
    ptx::bar_sync(1, 256);
    y[t - 128] = s[255 - t];
  }
}

// Past the end by one: of shared memory, static and dynamic, and of global memory.
__global__ void past_static_shared(const float* x, float* y) {
  FP_SHARED(float, s, [256]);
  const int t = threadIdx.x, at = t + 1;
  s[at ONLY_MENDED(&255)] = x[t];
  __syncthreads();
  y[t] = s[t ? t : 1];
}

__global__ void past_dynamic_shared(const float* x, float* y) {
  FP_DYNAMIC_SHARED(float, s);
  const int t = threadIdx.x, at = 769 + t;
  s[at ONLY_MENDED(&1023)] = x[t];
  __syncthreads();
  y[t] = s[t == 255 ? 1023 : t + 769];
}

__global__ void past_global(const float* x, float* y) {
  const int t = threadIdx.x, at = 769 + t;
  y[t] = x[at ONLY_MENDED(&1023)];
}

__global__ void misaligned_load(const float* x, float* y) {
  const int t = threadIdx.x;
  y[t] = __uint_as_float(ptx::load(reinterpret_cast<const uint4*>(x + t ONLY_MENDED(/ 4 * 4))).x);
}

__global__ void uninitialised_shared(const float* x, float* y) {
  FP_SHARED(float, s, [256]);
  const int t = threadIdx.x;
  if (t < 255 ONLY_MENDED(+1)) s[t] = x[t];
  __syncthreads();
  y[t] = s[t];
}

__global__ void divergent_barrier(const float* x, float* y) {
  const int t = threadIdx.x;
#ifndef MENDED
  if (t < 32) __syncthreads();
  else
#endif
    __syncthreads();
  y[t] = x[t];
}

__global__ void lanes_apart(const float* x, float* y) {
  const int t = threadIdx.x;
#ifdef MENDED
  __syncwarp();
#else
  if (t & 1) __syncwarp();
  else __ballot_sync(~0u, t);
#endif
  y[t] = x[t];
}

__global__ void deadlock(const float* x, float* y) {
  const int t = threadIdx.x;
  ptx::bar_sync(1, 512 ONLY_MENDED(/ 2));
  y[t] = x[t];
}

int main(int, char** arguments) {
  using Kernel = void (*)(const float*, float*);
  const std::map<std::string, Kernel> kernels = {{"missing_syncthreads", missing_syncthreads},
                                                 {"missing_barrier_at_loop_end", missing_barrier_at_loop_end},
                                                 {"missing_syncwarp", missing_syncwarp},
                                                 {"shuffle_as_fence", shuffle_as_fence},
                                                 {"missing_copy_wait", missing_copy_wait},
                                                 {"missing_barrier_after_copy", missing_barrier_after_copy},
                                                 {"two_blocks_add", two_blocks_add},
                                                 {"named_barrier", named_barrier},
                                                 {"past_static_shared", past_static_shared},
                                                 {"past_dynamic_shared", past_dynamic_shared},
                                                 {"past_global", past_global},
                                                 {"misaligned_load", misaligned_load},
                                                 {"uninitialised_shared", uninitialised_shared},
                                                 {"divergent_barrier", divergent_barrier},
                                                 {"lanes_apart", lanes_apart},
                                                 {"deadlock", deadlock}};
  const std::string name = arguments[1];
  float* x = static_cast<float*>(aligned_alloc(64, 1024 * sizeof(float)));
  for (int i = 0; i < 1024; ++i) x[i] = static_cast<float>(i % 251);
  std::vector<float> y(256, -1.0f);
  y[0] = 0.0f;
  const bool dynamic =
      name == "past_dynamic_shared" || name == "missing_copy_wait" || name == "missing_barrier_after_copy";
  const int blocks = name == "two_blocks_add" ? 4 : 1;
  const cudaError_t error = FP_LAUNCH(kernels.at(name), blocks, 256, dynamic ? 4096 : 0, nullptr, x, y.data());
  for (float value : y) printf("%g ", static_cast<double>(value));
  printf("\n");
  free(x);
  return error != cudaSuccess;
}
