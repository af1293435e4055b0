// The table of kernels of one instruction set. What includes this is isa_<name>.cpp, which defines
//   FP_NAME    its name, as set_isa takes it
//   FP_ISA     what the headers ask for: 0 the compiler's vectors, 1 AVX2, 2 AVX-512, 3 with products of bf16 pairs
//   FP_TILES   where it has the tile registers of AMX
//   FP_TARGET  all that the compiler may use, in its own words; without it, what the compiler was asked for.
// The list of them is in dispatch.cpp.
#include <cstdint>
#include <cstring>

// Ahead of the target: their inline functions are the host's too, where the linker keeps one copy of each.
#include "simd/fourbit_kernels.h"
#include "simd/kernels.h"

#define FP_TEXT_OF(...) #__VA_ARGS__
#define FP_TEXT(...) FP_TEXT_OF(__VA_ARGS__)
#define FP_JOINED(a, b) a##b
#define FP_JOIN(a, b) FP_JOINED(a, b)

// clang-format off
#if !defined(FP_TARGET)
#define FP_SERVES
#elif defined(__x86_64__) && defined(__GNUC__) && (defined(__linux__) || !defined(FP_TILES))
#define FP_SERVES
#if defined(__clang__)
_Pragma(FP_TEXT(clang attribute push(__attribute__((target(FP_TARGET))), apply_to = function)))
#else
#if FP_ISA >= 2  // of GCC 12's own header, GCC bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
_Pragma(FP_TEXT(GCC target(FP_TARGET)))
#endif
#endif
// clang-format on

#ifdef FP_SERVES
#include "simd/table.h"
#define FP_TABLE &kTable
#if defined(FP_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
#else
#define FP_TABLE nullptr
#endif

namespace fastpeft {
const Kernels* FP_JOIN(kernels_, FP_NAME)() { return FP_TABLE; }
}  // namespace fastpeft
