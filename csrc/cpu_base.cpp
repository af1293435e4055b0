// The kernels in the instruction set that the compiler was asked for: every processor's fallback.
#define FP_ISA 0
#define FP_TABLE "base"
#include "cpu_kernels_impl.h"

namespace fastpeft {
const Kernels* kernels_base() { return &kTable; }
}  // namespace fastpeft
