// The operators on 4-bit weights for CUDA tensors: the launchers of the .cu files behind libtorch's stable ABI.
//
// Compiled to nothing if setup.py found no nvcc. The extension imports on a torch without CUDA, and holds its own copy
// of the CUDA runtime: the one symbol it needs of torch's CUDA side is weak.
#ifdef FASTPEFT_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>
#include <utility>
#include <vector>

#include "cuda/launchers.h"
#include "host/tensor.h"
#include "shared/fourbit.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastpeft {
namespace {

using std::optional;

void* stream_of(const Tensor& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "fastpeft: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

fp_weight4bit weight_of(const Tensor& packed, const std::vector<Tensor>& scales, const std::string& quant_type,
                        int64_t block_size) {
  auto f32 = [&](size_t i) { return static_cast<const float*>(scales[i].const_data_ptr()); };
  fp_weight4bit w{};
  w.packed = packed.const_data_ptr();
  w.quant_type = static_cast<int32_t>(quant_type == "nf4" ? FourBit::nf4 : FourBit::fp4);
  w.block_size = static_cast<int32_t>(block_size);
  if (scales.size() == 1) {
    w.absmax = f32(0);
  } else {
    w.codes = static_cast<const uint8_t*>(scales[0].const_data_ptr());
    w.code = f32(1);
    w.scale = f32(2);
    w.offset = f32(3);
  }
  return w;
}

fp_matrix matrix_of(const Tensor& t) {
  const bool rows = t.dim() == 2;
  return {const_cast<void*>(t.const_data_ptr()), rows ? t.stride(0) : t.numel(), static_cast<int32_t>(type_of(t))};
}

void check(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, "fastpeft: ", op, " failed with CUDA error ", error);
}

// out: contiguous of any shape, or [N, K] with rows further apart.
void dequantize_4bit(Tensor packed, std::vector<Tensor> scales, std::string quant_type, int64_t block_size,
                     Tensor out) {
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const fp_weight4bit w = weight_of(packed, scales, quant_type, block_size);
  fp_matrix to = matrix_of(out);
  const bool one_run = out.is_contiguous();
  const int64_t N = one_run ? 1 : out.size(0), K = one_run ? out.numel() : out.size(1);
  if (one_run) to.stride = K;
  check(fp_dequantize_4bit(&w, &to, N, K, stream_of(out)), "dequantize_4bit");
}

// s, b and bias as matrices, and what keeps them alive.
struct Thin {
  Thin(const optional<Tensor>& s, const optional<Tensor>& b, const optional<Tensor>& bias) {
    const optional<Tensor>* given[3] = {&s, &b, &bias};
    for (int i = 0; i < 3; ++i) {
      if (!*given[i]) continue;
      kept[i] = readable(**given[i]);
      matrix[i] = matrix_of(*kept[i]);
    }
  }
  optional<Tensor> kept[3];
  fp_matrix matrix[3] = {};
};

// fp32 [spans, rows, columns] where there are spans to add.
struct Sums {
  Sums(const Tensor& like, int64_t spans, int64_t rows, int64_t columns) {
    if (spans > 1) kept = torch::stable::new_empty(like, {spans, rows, columns}, ScalarType::Float);
  }
  float* data() { return kept ? static_cast<float*>(kept->mutable_data_ptr()) : nullptr; }
  optional<Tensor> kept;
};

void linear4bit_small(Tensor x, Tensor packed, std::vector<Tensor> scales, std::string quant_type, int64_t block_size,
                      optional<Tensor> s, optional<Tensor> b, optional<Tensor> bias, double scale, bool accumulate,
                      Tensor y) {
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  const fp_weight4bit w = weight_of(packed, scales, quant_type, block_size);
  const fp_matrix from = matrix_of(x), to = matrix_of(y);
  const Thin thin(s, b, bias);
  check(
      fp_linear4bit_small(&w, &from, &to, &thin.matrix[0], &thin.matrix[1], &thin.matrix[2], static_cast<float>(scale),
                          accumulate, x.size(0), y.size(1), x.size(1), s ? s->size(1) : 0, stream_of(y)),
      "linear4bit_small");
}

void linear4bit_mid(Tensor x, Tensor packed, std::vector<Tensor> scales, std::string quant_type, int64_t block_size,
                    optional<Tensor> s, optional<Tensor> b, optional<Tensor> bias, double scale, bool accumulate,
                    Tensor y) {
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  const fp_weight4bit w = weight_of(packed, scales, quant_type, block_size);
  const fp_matrix from = matrix_of(x), to = matrix_of(y);
  const Thin thin(s, b, bias);
  const int64_t M = x.size(0), N = y.size(1), K = x.size(1), spans = fp_linear4bit_mid_spans(M, N, K);
  Sums sums(x, spans, M, N);
  check(fp_linear4bit_mid(&w, &from, &to, &thin.matrix[0], &thin.matrix[1], &thin.matrix[2], static_cast<float>(scale),
                          accumulate, M, N, K, s ? s->size(1) : 0, sums.data(), spans, stream_of(y)),
        "linear4bit_mid");
}

void linear4bit_small_dx(Tensor dy, Tensor packed, std::vector<Tensor> scales, std::string quant_type,
                         int64_t block_size, bool accumulate, Tensor dx) {
  const torch::stable::accelerator::DeviceGuard guard(dx.get_device_index());
  const fp_weight4bit w = weight_of(packed, scales, quant_type, block_size);
  const fp_matrix from = matrix_of(dy), to = matrix_of(dx);
  const int64_t M = dy.size(0), N = dy.size(1), K = dx.size(1), spans = fp_linear4bit_small_dx_spans(M, N, K);
  Sums sums(dy, spans, M, K);
  check(fp_linear4bit_small_dx(&w, &from, &to, accumulate, M, N, K, sums.data(), spans, stream_of(dx)),
        "linear4bit_small_dx");
}

}  // namespace

// As 1000 major + 10 minor: the latest CUDA that the driver serves, 0 without one, and that of the runtime in this
// build.
std::pair<int, int> cuda_versions() {
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  return {driver, runtime};
}

}  // namespace fastpeft

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CUDA, m) {
  m.impl("dequantize_4bit", TORCH_BOX(&fastpeft::dequantize_4bit));
  m.impl("linear4bit_small", TORCH_BOX(&fastpeft::linear4bit_small));
  m.impl("linear4bit_mid", TORCH_BOX(&fastpeft::linear4bit_mid));
  m.impl("linear4bit_small_dx", TORCH_BOX(&fastpeft::linear4bit_small_dx));
}
#endif
