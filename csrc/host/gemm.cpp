// Which low-precision GEMMs run at the processor's full speed.
#include "host/gemm.h"

#include <atomic>

namespace fastpeft {
namespace {

std::atomic<bool> native_bf16{false}, native_f16{false};

}  // namespace

bool native(Type type) { return type == Type::f32 || (type == Type::bf16 ? native_bf16 : native_f16); }

void set_native_gemm(bool bf16, bool f16) {
  native_bf16 = bf16;
  native_f16 = f16;
}

}  // namespace fastpeft
