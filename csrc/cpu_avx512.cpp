// The kernels in AVX-512 (F, BW, DQ, VL).
#include <cstdint>
#include <cstring>

#include "cpu_kernels.h"
#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own header, GCC bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif
#define FP_ISA 2
#define FP_TABLE "avx512"
#include "cpu_kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastpeft {
const Kernels* kernels_avx512() { return &kTable; }
}  // namespace fastpeft
#else
namespace fastpeft {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace fastpeft
#endif
