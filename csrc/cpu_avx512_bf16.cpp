// The kernels in AVX-512 with products of bf16 pairs and permutations of bytes (BF16 and VBMI besides F, BW, DQ, VL): Zen 4 and later, and
// what has tiles. Cooper Lake, without VBMI, multiplies bf16 no faster than fp32.
#include <cstdint>
#include <cstring>

#include "cpu_kernels.h"
#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,avx512bf16,avx512vbmi"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own header, GCC bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,avx512bf16,avx512vbmi")
#endif
#define FP_ISA 3
#define FP_TABLE "avx512_bf16"
#include "cpu_kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastpeft {
const Kernels* kernels_avx512_bf16() { return &kTable; }
}  // namespace fastpeft
#else
namespace fastpeft {
const Kernels* kernels_avx512_bf16() { return nullptr; }
}  // namespace fastpeft
#endif
