// linear4bit on the CPU: the base product, then the adapter's share added to it.
//
// Signatures and meaning: fastpeft/reference/linear4bit.py.
#include <stdexcept>

#include "cpu/linear4bit_paths.h"
#include "cpu/lora_adapter.h"
#include "cpu/lora_pass.h"
#include "host/gemm.h"

namespace fastpeft {
namespace {

// y += bias, each row in fp32.
void add_bias(const Tensor& y, const optional<Tensor>& bias) {
  const auto start = start_row(bias, {}, y.size(1), 1.0f);
  if (!start) return;
  const int64_t N = y.size(1);
  parallel_rows(y.size(0), [&](int64_t m0, int64_t m1) {
    kernels().expand(nullptr, 0, m0, m1, 0, nullptr, padded(N), start->data, 1.0f, kAll, true, y.mutable_data_ptr(),
                     type_of(y), N, N);
  });
}

// Sums of dy over its rows, fp32 [N].
Tensor column_sums(const Tensor& dy) {
  const int64_t N = dy.size(1);
  Tensor sums = empty({N}, ScalarType::Float);
  const Tasks tasks(dy.size(0));
  Partials parts(tasks.count, 1, N);
  parallel(tasks.count, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      float* part = parts.clear(task);
      for_blocks(tasks.begin(task), tasks.begin(task + 1), [&](int64_t m0, int64_t m1) {
        kernels().reduce(rows_of(dy), m0, m1, N, kAll, nullptr, 0, 0, 1.0f, nullptr, nullptr, 0, nullptr, 0, part);
      });
    }
  });
  parts.finish(sums, 1.0f, false);
  return sums;
}

std::tuple<Tensor, Tensor> linear4bit_fwd(Tensor x, Tensor packed, std::vector<Tensor> scales, std::string quant_type,
                                          int64_t block_size, int64_t N, optional<Tensor> a, optional<Tensor> b,
                                          optional<Tensor> bias, optional<Tensor> lora_bias, double scale, double p,
                                          optional<Tensor> seed) {
  const int64_t M = x.size(0), K = x.size(1);
  const Weight w = {packed_of(packed, scales, quant_type, block_size), N, K};
  const Type type = type_of(x);
  const Path path = forward_path(M, K, type, block_size);
  const Tensor y = empty_like(x, {M, N});
  const bool direct = type == Type::f32 || writes_type_of_x(path, M, type);
  optional<Temporary> wide;
  const Tensor& sum = direct ? y : wide.emplace(M, N, ScalarType::Float).tensor;
  if (M && N) multiply_forward(path, w, x, sum);
  Tensor s = nothing(x);
  if (a) s = adapter_fwd(x, *a, *b, bias, lora_bias, scale, p, seed, sum, true);
  else add_bias(sum, bias);
  if (!direct) from_f32(sum, y);
  return {y, s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear4bit_bwd(Tensor dy, Tensor x, Tensor packed,
                                                          std::vector<Tensor> scales, std::string quant_type,
                                                          int64_t block_size, int64_t K, optional<Tensor> a,
                                                          optional<Tensor> b, Tensor s, double scale, double p,
                                                          optional<Tensor> seed, bool need_dx, bool need_da,
                                                          bool need_db, bool need_bias) {
  const int64_t M = dy.size(0), N = dy.size(1);
  const Weight w = {packed_of(packed, scales, quant_type, block_size), N, K};
  const Path path = need_dx ? backward_path(M, N, K, type_of(dy), block_size) : Path::panels;
  const bool direct = path != Path::panels || native(type_of(dy));
  const Tensor dx = need_dx ? empty_like(dy, {M, K}) : nothing(dy);
  optional<Temporary> wide;
  const Tensor& sum = need_dx && !direct ? wide.emplace(M, K, ScalarType::Float).tensor : dx;
  if (need_dx && M && K) multiply_backward(path, w, dy, sum);
  AdapterGrads grads = {nothing(dy), nothing(dy), empty({0}, ScalarType::Float)};
  if (a) grads = adapter_bwd(dy, x, *a, *b, s, scale, p, seed, {need_dx, need_da, need_db, need_bias}, sum, true);
  else if (need_bias) grads.bias = column_sums(dy);
  if (need_dx && !direct) from_f32(sum, dx);
  return {dx, grads.da, grads.db, grads.bias};
}

}  // namespace

// The name of the path of a forward pass, for explain.
std::string linear4bit_path(int64_t M, int64_t K, const std::string& dtype, int64_t block_size) {
  if (dtype != "float32" && dtype != "bfloat16" && dtype != "float16")
    throw std::invalid_argument("linear4bit_path: dtype must be float32, bfloat16 or float16, got " + dtype);
  const Type type = dtype == "bfloat16" ? Type::bf16 : dtype == "float16" ? Type::f16 : Type::f32;
  return name_of(forward_path(M, K, type, block_size));
}

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) {
  m.impl("linear4bit_fwd", TORCH_BOX(&linear4bit_fwd));
  m.impl("linear4bit_bwd", TORCH_BOX(&linear4bit_bwd));
}

}  // namespace fastpeft
