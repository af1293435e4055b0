// dequantize_4bit on the CPU. Bound by memory: 2.5 bytes a value in bf16.
//
// Signature and meaning: fastpeft/reference/dequantize_4bit.py.
#include "cpu/packed_weight.h"
#include "host/tasks.h"

namespace fastpeft {
namespace {

// Values of one task: a whole number of blocks of every size, and of nested blocks of absmax up to a block size of 256.
constexpr int64_t kTaskValues = 1 << 16;

void dequantize_4bit(Tensor packed, std::vector<Tensor> scales, std::string quant_type, int64_t block_size,
                     Tensor out) {
  const int64_t n = out.numel(), count = (n + kTaskValues - 1) / kTaskValues;
  if (n == 0) return;
  const Packed w = packed_of(packed, scales, quant_type, block_size);
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const Type type = type_of(out);
  parallel(count, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kTaskValues;
    four_bit().decode(w, begin, std::min(last * kTaskValues, n) - begin, 1, 0, data + begin * size_of(type), type);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) { m.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit)); }

}  // namespace fastpeft
