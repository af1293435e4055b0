// The schemas of the operators; the file of an operator registers its implementation.
#include "host/tensor.h"

STABLE_TORCH_LIBRARY(fastpeft_cpp, m) {
  m.def("lora_shrink(Tensor x, Tensor a, float p, Tensor? seed) -> Tensor");
  m.def("lora_expand(Tensor s, Tensor b, Tensor? bias, Tensor? lora_bias, float scale) -> Tensor");
  m.def("lora_expand_add(Tensor(a!) y, Tensor s, Tensor b, float scale) -> ()");
  m.def(
      "lora_grad_b(Tensor dy, Tensor s, Tensor b, float scale, bool need_db, bool need_bias, Tensor? mask) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "lora_grad_a(Tensor x, Tensor ds, Tensor a, float p, Tensor? seed, bool need_dx, bool need_da, Tensor? mask) -> "
      "(Tensor, Tensor)");
  m.def(
      "lora_linear_fwd(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor? lora_bias, float scale, float p, "
      "Tensor? seed) -> (Tensor, Tensor)");
  m.def(
      "lora_linear_bwd(Tensor dy, Tensor x, Tensor w, Tensor a, Tensor b, Tensor s, float scale, float p, Tensor? "
      "seed, "
      "bool need_dx, bool need_da, bool need_db, bool need_bias, Tensor? mask_a, Tensor? mask_b) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lora_between_fwd(Tensor x, Tensor w, Tensor s, Tensor b, Tensor? bias, Tensor? lora_bias, float scale) -> "
      "Tensor");
  m.def(
      "lora_between_bwd(Tensor dy, Tensor x, Tensor w, Tensor ds, Tensor a, float p, Tensor? seed, bool need_dx, bool "
      "need_da) -> "
      "(Tensor, Tensor)");
  m.def("dropout_rows(Tensor x, float p, Tensor seed, int first_row, bool add, Tensor(a!) out) -> ()");
  m.def("quantize_4bit(Tensor w, str quant_type, int block_size) -> (Tensor, Tensor)");
  m.def("quantize_absmax(Tensor values, Tensor code) -> (Tensor, Tensor)");
  m.def("dequantize_4bit(Tensor packed, Tensor[] scales, str quant_type, int block_size, Tensor(a!) out) -> ()");
  m.def(
      "linear4bit_fwd(Tensor x, Tensor packed, Tensor[] scales, str quant_type, int block_size, int N, Tensor? a, "
      "Tensor? b, "
      "Tensor? bias, Tensor? lora_bias, float scale, float p, Tensor? seed) -> (Tensor, Tensor)");
  m.def(
      "linear4bit_bwd(Tensor dy, Tensor x, Tensor packed, Tensor[] scales, str quant_type, int block_size, int K, "
      "Tensor? a, "
      "Tensor? b, Tensor s, float scale, float p, Tensor? seed, bool need_dx, bool need_da, bool need_db, bool "
      "need_bias) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear4bit_small(Tensor x, Tensor packed, Tensor[] scales, str quant_type, int block_size, Tensor? s, Tensor? "
      "b, "
      "Tensor? bias, float scale, bool accumulate, Tensor(a!) y) -> ()");
  m.def(
      "linear4bit_small_dx(Tensor dy, Tensor packed, Tensor[] scales, str quant_type, int block_size, bool accumulate, "
      "Tensor(a!) dx) -> ()");
  m.def(
      "linear4bit_mid(Tensor x, Tensor packed, Tensor[] scales, str quant_type, int block_size, Tensor? s, Tensor? b, "
      "Tensor? bias, float scale, bool accumulate, Tensor(a!) y) -> ()");
}
