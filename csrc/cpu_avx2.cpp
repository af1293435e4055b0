// The kernels in AVX2 with FMA and F16C.
#include <cstdint>
#include <cstring>

#include "cpu_kernels.h"
#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FP_ISA 1
#define FP_TABLE "avx2"
#include "cpu_kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastpeft {
const Kernels* kernels_avx2() { return &kTable; }
}  // namespace fastpeft
#else
namespace fastpeft {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace fastpeft
#endif
