// out (+)= mask ∘ x / keep on the CPU, ahead of vendor libraries' products, which take no mask.
//
// x [M, K] with contiguous rows, out likewise; row 0 of x has row first_row of the mask.
#include "cpu/lora_pass.h"

namespace fastpeft {
namespace {

void dropout_rows(Tensor x, double p, Tensor seed, int64_t first_row, bool add, Tensor out) {
  const int64_t width = x.size(1);
  const Mask mask = mask_of(p, seed);
  const Type type = type_of(x);
  const int64_t stride = out.stride(0);
  parallel_rows(x.size(0), [&](int64_t m0, int64_t m1) {
    BlockMask bits(mask, width);
    char* block = static_cast<char*>(out.mutable_data_ptr()) + m0 * stride * size_of(type);
    kernels().drop(rows_of(x), m0, m1, width, bits.of(first_row + m0, first_row + m1), mask.factor, add, block, stride);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) { m.impl("dropout_rows", TORCH_BOX(&dropout_rows)); }

}  // namespace fastpeft
