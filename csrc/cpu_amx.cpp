// The kernels in AVX-512-BF16 and, where bf16 is multiplied, on the tile registers of AMX-BF16, or of 8-bit integers (VNNI, which every such
// processor has).
#include <cstdint>
#include <cstring>

#include "cpu_kernels.h"
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,avx512bf16,avx512vbmi,avx512vnni"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own header, GCC bug 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,avx512bf16,avx512vbmi,avx512vnni")
#endif
#define FP_ISA 3
#define FP_TILES
#define FP_TABLE "amx_bf16"
#include "cpu_kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastpeft {
const Kernels* kernels_amx_bf16() { return &kTable; }
}  // namespace fastpeft
#else
namespace fastpeft {
const Kernels* kernels_amx_bf16() { return nullptr; }
}  // namespace fastpeft
#endif
