// lora_linear on the CPU: what the adapter adds, in one visit of each block of rows, and the vendor GEMM.
//
// Signatures and meaning: fastpeft/reference/lora_linear.py.
#include <atomic>

#include "base_product.h"
#include "lora_adapter.h"

namespace fastpeft {
namespace {

// Which low-precision GEMMs this torch has at the speed of its processor; set once on import.
std::atomic<bool> native_bf16{false}, native_f16{false};

// The base product with x in fp32, panel by panel of W: torch's own bf16 and fp16 products on a processor without such
// instructions run at 1 to 12 GFLOP/s, the fp32 one at its peak. y fp32 [M, N] += x wᵀ.
constexpr int64_t kUpcastRows = 512;

template <class F>
void upcast_panels(const Tensor& w, F f) {
  for (int64_t n = 0; n < w.size(0); n += kUpcastRows) {
    const int64_t rows = std::min(kUpcastRows, w.size(0) - n);
    Tensor panel = torch::stable::narrow(const_cast<Tensor&>(w), 0, n, rows);
    if (panel.stride(1) != 1) panel = torch::stable::contiguous(panel);
    f(to_f32(panel), n, rows);
  }
}

std::tuple<Tensor, Tensor> lora_linear_fwd(Tensor x, Tensor w, Tensor a, Tensor b, optional<Tensor> bias,
                                           optional<Tensor> lora_bias, double scale, double p, optional<Tensor> seed,
                                           std::string) {
  const Type type = type_of(x);
  Tensor y = empty_like(x, {x.size(0), w.size(0)});
  if (type != Type::f32 && native(type)) {
    gemm(y, x, transpose(w), 0.0);
    return adapter_fwd(x, w.size(0), a, b, bias, lora_bias, scale, p, seed, y.scalar_type(), y);
  }
  const auto [sum, s] = adapter_fwd(x, w.size(0), a, b, bias, lora_bias, scale, p, seed, ScalarType::Float);
  if (type == Type::f32) {
    gemm(sum, x, transpose(w));
    return {sum, s};
  }
  if (x.size(0)) {
    const Tensor x32 = to_f32(x), into = sum;
    upcast_panels(w, [&](const Tensor& w32, int64_t n, int64_t count) { gemm(columns(into, n, count), x32, transpose(w32)); });
    from_f32(sum, y);
  }
  return {y, s};
}

// One visit of each block of rows gives ds, db, the bias gradient, da and the adapter's share of dx.
std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_bwd(Tensor dy, Tensor x, Tensor w, Tensor a, Tensor b, Tensor s,
                                                           double scale, double p, optional<Tensor> seed, std::string,
                                                           bool need_dx, bool need_da, bool need_db, bool need_bias) {
  const Type type = type_of(dy);
  const AdapterNeeds need = {need_dx, need_da, need_db, need_bias};
  optional<Tensor> base;
  if (need_dx && type != Type::f32 && native(type)) {
    base = empty_like(dy, {dy.size(0), w.size(1)});
    gemm(*base, dy, w, 0.0);
  }
  const AdapterGrads grads = adapter_bwd(dy, x, a, b, s, scale, p, seed, need, base ? dy.scalar_type() : ScalarType::Float, base);
  Tensor dx = grads.dx;
  if (!need_dx) {
    dx = nothing(dy);
  } else if (type == Type::f32) {
    gemm(dx, dy, w);
  } else if (!base) {
    dx = empty_like(dy, {dy.size(0), w.size(1)});
    if (dy.size(0)) {
      const Tensor dy32 = to_f32(dy);
      upcast_panels(w, [&](const Tensor& w32, int64_t n, int64_t count) { gemm(grads.dx, columns(dy32, n, count), w32); });
      from_f32(grads.dx, dx);
    }
  }
  return {dx, grads.da, grads.db, grads.bias};
}

}  // namespace

bool native(Type type) { return type == Type::f32 || (type == Type::bf16 ? native_bf16 : native_f16); }

void set_native_gemm(bool bf16, bool f16) {
  native_bf16 = bf16;
  native_f16 = f16;
}

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&lora_linear_bwd));
}

}  // namespace fastpeft
