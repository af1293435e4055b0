// AVX-512 (F, BW, DQ, VL).
#define FP_NAME avx512
#define FP_ISA 2
#define FP_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"
#include "simd/isa.h"
