// Every processor's fallback.
#define FP_NAME base
#define FP_ISA 0
#include "simd/isa.h"
