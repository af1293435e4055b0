// AVX2 with FMA and F16C.
#define FP_NAME avx2
#define FP_ISA 1
#define FP_TARGET "avx2,fma,f16c"
#include "simd/isa.h"
