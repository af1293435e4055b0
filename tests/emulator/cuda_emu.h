// Compiles a .cu file as plain C++ and runs it on the CPU: every CUDA thread a fibre, one block at a time, on one OS
// thread.
//
// csrc/cuda/fp_cuda.h includes this header where the compiler is not nvcc. It gives the device-only names of CUDA that
// the kernels use; types and conversions come from NVIDIA's own headers. Rounding is the source's: build with
// -ffp-contract=off. What it cannot show: speed, the memory model (atomics are acquire-release here, so a missing
// __threadfence goes unseen), and the sums of a tensor core, which are sequential fp32 here.
#pragma once
#ifdef __CUDACC__
#error "cuda_emu.h is for a host compiler"
#endif

#define __shared__ static  // one block is resident at a time
#define __constant__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline

// Where a collective was called from: lanes that meet at different lines are an error.
#define EMU_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace emu {

struct Thread {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
  int index, lane, warp;
};

enum class WarpOp { sync, shuffle, ballot, mma_bf16, mma_f16, ldmatrix };

struct MmaOperands {
  uint32_t a[4], b[2];
  float c[4];
};

extern "C" {
extern Thread* emu_current;
void emu_launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>* body);
int emu_barrier(int id, int count, bool arrive_only, int predicate, const char* file, int line);
void emu_warp(uint32_t mask, WarpOp op, int argument, const void* in, void* out, const char* file, int line);
void* emu_dynamic_shared();
void* emu_static_shared(const void* key, size_t bytes, size_t align);
void emu_cp_async(void* to, const void* from, int bytes, int source_bytes);
void emu_cp_commit();
void emu_cp_wait(int pending);
void emu_check_aligned(const void* p, size_t align, const char* what);
unsigned emu_shared_address(const void* p);
// Bytes of global memory: a streaming load and a store count each time, a cached load once per 32-byte sector.
enum { EMU_STREAM, EMU_CACHED, EMU_STORE };
void emu_count(const void* p, size_t bytes, int kind);
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A&&... arguments) {
  std::function<void()> body = [&] { kernel(static_cast<P>(arguments)...); };
  emu_launch(grid, block, shared_bytes, &body);
  return cudaGetLastError();
}

template <class T>
T shuffle(uint32_t mask, T value, int source, const char* file, int line) {
  T out;
  emu_warp(mask, WarpOp::shuffle, static_cast<int>(sizeof(T)) << 8 | source, &value, &out, file, line);
  return out;
}

template <class T, class F>
T read_modify_write(T* p, F change) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  emu_check_aligned(p, sizeof(T), "an atomic");
  Bits* bits = reinterpret_cast<Bits*>(p);
  Bits seen = __atomic_load_n(bits, __ATOMIC_ACQUIRE), wanted;
  T before, after;
  do {
    memcpy(&before, &seen, sizeof seen);
    after = change(before);
    memcpy(&wanted, &after, sizeof after);
  } while (!__atomic_compare_exchange_n(bits, &seen, wanted, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
  return before;
}

}  // namespace emu

#define threadIdx (emu::emu_current->thread_index)
#define blockIdx (emu::emu_current->block_index)
#define blockDim (emu::emu_current->block_size)
#define gridDim (emu::emu_current->grid_size)

inline void __syncthreads(EMU_WHERE) { emu::emu_barrier(0, 0, false, 0, file, line); }
inline int __syncthreads_count(int p, EMU_WHERE) { return emu::emu_barrier(0, 0, false, p != 0, file, line); }
inline int __syncthreads_or(int p, EMU_WHERE) { return __syncthreads_count(p, file, line) != 0; }
inline void __threadfence() { asm volatile("" ::: "memory"); }
inline void __threadfence_block() { asm volatile("" ::: "memory"); }

inline void __syncwarp(uint32_t mask = ~0u, EMU_WHERE) {
  emu::emu_warp(mask, emu::WarpOp::sync, 0, nullptr, nullptr, file, line);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, EMU_WHERE) {
  const int lane = emu::emu_current->lane;
  return emu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), file, line);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, EMU_WHERE) {
  const int lane = emu::emu_current->lane, source = lane ^ bits;
  return emu::shuffle(mask, value, (source & ~(width - 1)) > (lane & ~(width - 1)) ? lane : source, file, line);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32, EMU_WHERE) {
  const int lane = emu::emu_current->lane;
  return emu::shuffle(mask, value, (lane & (width - 1)) + by >= width ? lane : lane + by, file, line);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int by, int width = 32, EMU_WHERE) {
  const int lane = emu::emu_current->lane;
  return emu::shuffle(mask, value, (lane & (width - 1)) < by ? lane : lane - by, file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, EMU_WHERE) {
  uint32_t out;
  emu::emu_warp(mask, emu::WarpOp::ballot, 0, &predicate, &out, file, line);
  return out;
}
inline int __any_sync(uint32_t mask, int p, EMU_WHERE) { return __ballot_sync(mask, p, file, line) != 0; }
inline int __all_sync(uint32_t mask, int p, EMU_WHERE) { return __ballot_sync(mask, !p, file, line) == 0; }

template <class T>
T atomicAdd(T* p, std::common_type_t<T> value) {
  return emu::read_modify_write(p, [&](T before) { return static_cast<T>(before + value); });
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> value) {
  return emu::read_modify_write(p, [&](T before) { return before > value ? before : value; });
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof bits);
  return value;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i) & 15;
    uint32_t byte = bytes >> (8 * (pick & 7)) & 0xff;
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    out |= byte << (8 * i);
  }
  return out;
}

// The twins of the PTX wrappers in csrc/cuda/fp_cuda.h.
namespace ptx {

template <class T>
T load_stream(const T* p) {
  emu::emu_check_aligned(p, sizeof(T), "load_stream");
  emu::emu_count(p, sizeof(T), emu::EMU_STREAM);
  return *p;
}
template <class T>
T load(const T* p) {
  emu::emu_check_aligned(p, sizeof(T), "load");
  emu::emu_count(p, sizeof(T), emu::EMU_CACHED);
  return *p;
}
template <class T>
void store(T* p, T value) {
  emu::emu_check_aligned(p, sizeof(T), "store");
  emu::emu_count(p, sizeof(T), emu::EMU_STORE);
  *p = value;
}

inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, bool half,
                EMU_WHERE) {
  emu::MmaOperands in{{a0, a1, a2, a3}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  float out[4];
  emu::emu_warp(~0u, half ? emu::WarpOp::mma_f16 : emu::WarpOp::mma_bf16, 0, &in, out, file, line);
  memcpy(c, out, sizeof out);
}
template <class T>
void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                  EMU_WHERE) {
  mma(c, a0, a1, a2, a3, b0, b1, std::is_same_v<T, __half>, file, line);
}

template <int N, bool Transposed>
void ldmatrix(uint32_t (&r)[N], const void* row, EMU_WHERE) {
  emu::emu_check_aligned(row, 16, "a row of ldmatrix");
  if (emu::emu_current->lane < 8 * N) {  // an ordinary read, that a sanitizer sees
    volatile uint64_t first = static_cast<const uint64_t*>(row)[0], second = static_cast<const uint64_t*>(row)[1];
    (void)first, (void)second;
  }
  emu::emu_warp(~0u, emu::WarpOp::ldmatrix, N | (Transposed ? 16 : 0), &row, r, file, line);
}

inline void cp_async16(void* to, const void* from, int source_bytes = 16) {
  emu::emu_check_aligned(to, 16, "the target of cp.async");
  emu::emu_check_aligned(from, 16, "the source of cp.async");
  if (source_bytes) emu::emu_count(from, static_cast<size_t>(source_bytes), emu::EMU_CACHED);
  emu::emu_cp_async(to, from, 16, source_bytes);
}
inline void cp_async_commit() { emu::emu_cp_commit(); }
template <int Pending>
void cp_async_wait() {
  emu::emu_cp_wait(Pending);
}
inline void bar_sync(int id, int count, EMU_WHERE) { emu::emu_barrier(id, count, false, 0, file, line); }
inline void bar_arrive(int id, int count, EMU_WHERE) { emu::emu_barrier(id, count, true, 0, file, line); }

}  // namespace ptx

#define FP_SHARED(T, name, dims) \
  using name##_shape = T dims;   \
  static char name##_key;        \
  name##_shape& name =           \
      *static_cast<name##_shape*>(emu::emu_static_shared(&name##_key, sizeof(name##_shape), alignof(name##_shape)))
#define FP_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(emu::emu_dynamic_shared())
#define FP_LAUNCH emu::launch
