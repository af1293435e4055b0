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

// Whether the vendor GEMM goes first, and the adapter adds to it. In bf16 that is the faster order (lora_adapter.h); in fp32 the
// exact one for few rows or columns, where the vendor adds every single term of a dot product to what y holds already.
constexpr int64_t kFew = 16;
bool is_base_first(Type type, int64_t rows, int64_t columns) { return native(type) && (type != Type::f32 || std::min(rows, columns) < kFew); }

// The base product with x in fp32, panel by panel of W: torch's own bf16 and fp16 products on a processor without such
// instructions run at 1 to 12 GFLOP/s, the fp32 one at its peak. y fp32 [M, N] += x wᵀ.
constexpr int64_t kUpcastRows = 512;

template <class F>
void upcast_panels(const Tensor& w, F f) {
  for (int64_t n = 0; n < w.size(0); n += kUpcastRows) {
    const int64_t count = std::min(kUpcastRows, w.size(0) - n);
    Tensor panel = rows(w, n, count);
    if (panel.stride(1) != 1) panel = torch::stable::contiguous(panel);
    f(to_f32(panel), n, count);
  }
}

std::tuple<Tensor, Tensor> lora_linear_fwd(Tensor x, Tensor w, Tensor a, Tensor b, optional<Tensor> bias,
                                           optional<Tensor> lora_bias, double scale, double p, optional<Tensor> seed) {
  const int64_t M = x.size(0), N = w.size(0);
  const Type type = type_of(x);
  const bool base_first = is_base_first(type, M, N);
  const Tensor y = empty_like(x, {M, N});
  optional<Temporary> wide;
  const Tensor& sum = native(type) ? y : wide.emplace(M, N, ScalarType::Float).tensor;
  if (base_first) gemm(y, x, transpose(w), 0.0);
  const Tensor s = adapter_fwd(x, a, b, bias, lora_bias, scale, p, seed, sum, base_first);
  if (base_first) return {y, s};
  if (native(type)) {
    gemm(y, x, transpose(w));
  } else if (M) {
    const Temporary x32 = to_f32(x);
    upcast_panels(w, [&](const Tensor& w32, int64_t n, int64_t count) { gemm(columns(sum, n, count), x32, transpose(w32)); });
    from_f32(sum, y);
  }
  return {y, s};
}

// One visit of each block of rows gives ds, db, the bias gradient, da and the adapter's share of dx.
std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_bwd(Tensor dy, Tensor x, Tensor w, Tensor a, Tensor b, Tensor s,
                                                           double scale, double p, optional<Tensor> seed,
                                                           bool need_dx, bool need_da, bool need_db, bool need_bias) {
  const int64_t M = dy.size(0), K = w.size(1);
  const Type type = type_of(dy);
  const bool base_first = is_base_first(type, M, K);
  const Tensor dx = need_dx ? empty_like(dy, {M, K}) : nothing(dy);
  optional<Temporary> wide;
  const Tensor& sum = need_dx && !native(type) ? wide.emplace(M, K, ScalarType::Float).tensor : dx;
  if (need_dx && base_first) gemm(dx, dy, w, 0.0);
  const AdapterGrads grads =
      adapter_bwd(dy, x, a, b, s, scale, p, seed, {need_dx, need_da, need_db, need_bias}, sum, base_first);
  if (!need_dx || base_first) return {dx, grads.da, grads.db, grads.bias};
  if (native(type)) {
    gemm(dx, dy, w);
  } else if (M) {
    const Temporary dy32 = to_f32(dy);
    upcast_panels(w, [&](const Tensor& w32, int64_t n, int64_t count) { gemm(sum, columns(dy32, n, count), w32); });
    from_f32(sum, dx);
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
