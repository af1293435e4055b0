// AVX-512 with products of bf16 pairs and permutations of bytes (BF16 and VBMI besides F, BW, DQ, VL): Zen 4 and later,
// and what has tiles. Cooper Lake, without VBMI, multiplies bf16 no faster than fp32.
#define FP_NAME avx512_bf16
#define FP_ISA 3
#define FP_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,avx512bf16,avx512vbmi"
#include "simd/isa.h"
