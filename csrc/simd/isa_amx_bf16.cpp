// AVX-512-BF16 and, where bf16 is multiplied, the tile registers of AMX-BF16, or 8-bit integers (VNNI, which every such
// processor has).
#define FP_NAME amx_bf16
#define FP_ISA 3
#define FP_TILES
#define FP_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,avx512bf16,avx512vbmi,avx512vnni"
#include "simd/isa.h"
