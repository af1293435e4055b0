// linear4bit on the CPU: one or two rows of x in products of bytes and up to some hundred on tile registers, where there are such; else a
// few on the nibbles as they lie; and more block by block where vectors multiply bf16, else through panels of W and the vendor GEMM.
//
// Signatures and meaning: fastpeft/reference/linear4bit.py. A panel of W is decoded into a buffer that stays in a cache, so
// that W in 16 bits is neither written to memory nor read from it.
#include <stdexcept>

#include "base_product.h"
#include "fourbit_weight.h"
#include "lora_adapter.h"

namespace fastpeft {
namespace {

// Rows of W whose absmax is decoded at a time by such a product.
constexpr int64_t kWeightRows = 128;
// The rows up to which tiles and blocks write fp32, which is rounded once, after the adapter: there is little of it.
constexpr int64_t kFewRows = 64;
// The rows that blocks take at a time, each of which reads them all again.
constexpr int64_t kBlockedRows = 256;
// The rows up to which tiles, which decode W again for every kTiledGroup rows, are faster than panels: measured at K = N = 4096.
constexpr int64_t kTiledForwardRows = 512, kTiledBackwardRows = 256;
// Bytes of a panel, against the rows that every panel reads again: at 1024 rows and K = N = 4096 the backward pass takes 47 ms with
// 1 MiB, 38 with 2 MiB and as much with 8.
constexpr int64_t kPanelBytes = 1 << 21;

struct Weight {
  Packed packed;
  int64_t N, K;

  // W[n0 : n1, k0 : k1] to [n1 - n0, k1 - k0].
  void decode(int64_t n0, int64_t n1, int64_t k0, int64_t k1, const Tensor& out) const {
    char* data = static_cast<char*>(out.mutable_data_ptr());
    const Type type = type_of(out);
    const int64_t width = k1 - k0, grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, width));
    parallel((n1 - n0 + grain - 1) / grain, [&](int64_t first, int64_t last) {
      const int64_t begin = n0 + first * grain, end = std::min(n1, n0 + last * grain);
      char* to = data + (begin - n0) * width * size_of(type);
      const bool whole = width == K;
      four_bit().decode(packed, begin * K + k0, whole ? (end - begin) * K : width, whole ? 1 : end - begin, K, to, type);
    });
  }
};

// The rows (or columns) of a panel of `other` values each: whole blocks of 64.
int64_t panel_width(int64_t other, Type type) { return std::max<int64_t>(64, kPanelBytes / (std::max<int64_t>(1, other) * size_of(type)) / 64 * 64); }

// y = x wᵀ
void multiply_rows(const Weight& w, const Tensor& x, const Tensor& y) {
  const int64_t step = std::min(w.N, panel_width(w.K, type_of(x)));
  const Tensor panel = empty_like(x, {step, w.K});
  for (int64_t n = 0; n < w.N; n += step) {
    const int64_t count = std::min(step, w.N - n);
    w.decode(n, n + count, 0, w.K, panel);
    gemm(columns(y, n, count), x, transpose(torch::stable::narrow(const_cast<Tensor&>(panel), 0, 0, count)), 0.0);
  }
}

// dx = dy w, a panel of columns of w at a time: over rows, the partial sums would be rounded each time.
void multiply_columns(const Weight& w, const Tensor& dy, const Tensor& dx) {
  const int64_t step = std::min(w.K, panel_width(w.N, type_of(dy)));
  for (int64_t k = 0; k < w.K; k += step) {
    const int64_t count = std::min(step, w.K - k);
    const Tensor panel = empty_like(dy, {w.N, count});
    w.decode(0, w.N, k, k + count, panel);
    gemm(columns(dx, k, count), dy, panel, 0.0);
  }
}

// How a product with rows of x of this type is made.
enum class Way {
  bytes,    // one or two rows in products of bytes, where integers hold x
  tiles,    // on tile registers
  nibbles,  // a few rows on the nibbles as they lie
  blocks,   // W decoded block by block for vectors
  panels,   // W decoded panel by panel for the vendor GEMM
};

// Of M rows, `most` at most.
bool tiled(int64_t M, int64_t most, int64_t K, Type type, int64_t block_size) {
  return M <= most && four_bit().tiles && type == Type::bf16 && block_size >= kLeastTiledBlock && K % block_size == 0;
}

// Of the forward pass.
Way way_of(int64_t M, int64_t K, Type type, int64_t block_size, bool by_bytes = true) {
  if (K == 0 || K % block_size) return Way::panels;  // a product of nothing is the vendor GEMM's zeros
  if (by_bytes && four_bit().bytes && M <= kByteRows && type != Type::f32 && block_size >= kLeastTiledBlock) return Way::bytes;
  if (tiled(M, kTiledForwardRows, K, type, block_size)) return Way::tiles;
  if (M <= four_bit().few_rows(type)) return Way::nibbles;
  return four_bit().blocks && type == Type::bf16 ? Way::blocks : Way::panels;
}

// product(absmax of their blocks, n0, n1) for `step` rows of W at a time.
template <class F>
void for_weight_rows(const Weight& w, int64_t step, F product) {
  const int64_t row_blocks = w.K / w.packed.block_size;
  parallel((w.N + step - 1) / step, [&](int64_t first, int64_t last) {
    Scratch absmax(step * row_blocks);
    for (int64_t task = first; task < last; ++task) {
      const int64_t n0 = task * step, n1 = std::min(n0 + step, w.N);
      four_bit().absmax(w.packed.absmax, n0 * row_blocks, n1 * row_blocks, absmax);
      product(static_cast<const float*>(absmax), n0, n1);
    }
  });
}

// y fp32 = x wᵀ
void multiply_nibbles(const Weight& w, const Tensor& x, const Tensor& y) {
  const FourBitKernels& kernel = four_bit();
  const bool pairs = kernel.in_pairs(type_of(x));
  const int64_t M = x.size(0);
  Scratch rows(M * arranged(w.K) / (pairs ? 2 : 1));
  kernel.arrange(rows_of(x), w.K, rows);
  float* out = static_cast<float*>(y.mutable_data_ptr());
  for_weight_rows(w, kWeightRows, [&](const float* absmax, int64_t n0, int64_t n1) {
    kernel.product(rows, pairs, M, w.K, w.packed, absmax, n0, n1, out, w.N);
  });
}

// y fp32 = x wᵀ; false, with y as it was, where integers do not hold x.
bool multiply_bytes(const Weight& w, const Tensor& x, const Tensor& y) {
  const FourBitBytes& kernel = *four_bit().bytes;
  const int64_t M = x.size(0);
  Scratch room((kernel.room(M, w.K) + 3) / 4);
  if (!kernel.arrange(rows_of(x), w.K, room)) return false;
  float* out = static_cast<float*>(y.mutable_data_ptr());
  parallel((w.N + kWeightRows - 1) / kWeightRows, [&](int64_t first, int64_t last) {
    kernel.product(room, M, w.K, w.packed, first * kWeightRows, std::min(last * kWeightRows, w.N), out, w.N);
  });
  return true;
}

// f(m0, m1, those rows of x in the order that `arrange` gives) for groups of rows.
template <class Arrange, class F>
void for_tiled_groups(const Tensor& x, Arrange arrange, F f) {
  const int64_t M = x.size(0), width = x.size(1);
  for (int64_t m0 = 0; m0 < M; m0 += kTiledGroup) {
    const int64_t m1 = std::min(m0 + kTiledGroup, M);
    Scratch rows(tiled_floats(m1 - m0, width));
    uint32_t* const to = reinterpret_cast<uint32_t*>(rows.data);
    arrange(rows_of(x), m0, m1, to);
    f(m0, m1, to);
  }
}

char* row_of(const Tensor& t, int64_t m) { return static_cast<char*>(t.mutable_data_ptr()) + m * t.stride(0) * size_of(type_of(t)); }

// y fp32 or bf16 = x wᵀ
void multiply_rows_tiled(const Weight& w, const Tensor& x, const Tensor& y) {
  const FourBitTiles& kernel = *four_bit().tiles;
  const auto arrange = [&](const Rows& rows, int64_t m0, int64_t m1, uint32_t* to) {
    kernel.arrange_forward(rows, m0, m1, w.K, w.packed.block_size, to);
  };
  for_tiled_groups(x, arrange, [&](int64_t m0, int64_t m1, const uint32_t* rows) {
    for_weight_rows(w, tiled_weights(m1 - m0), [&](const float* absmax, int64_t n0, int64_t n1) {
      kernel.forward(rows, m1 - m0, w.K, w.packed, absmax, n0, n1, row_of(y, m0), type_of(y), y.stride(0));
    });
  });
}

// y fp32 or bf16 = x wᵀ
void multiply_rows_blocked(const Weight& w, const Tensor& x, const Tensor& y) {
  const FourBitBlocks& kernel = *four_bit().blocks;
  const int64_t M = x.size(0);
  for (int64_t m0 = 0; m0 < M; m0 += kBlockedRows) {
    const int64_t m1 = std::min(m0 + kBlockedRows, M);
    Scratch rows((m1 - m0) * arranged(w.K) / 2);
    uint32_t* const to = reinterpret_cast<uint32_t*>(rows.data);
    parallel(arranged(w.K) / kBlockedColumns, [&](int64_t first, int64_t last) { kernel.arrange(rows_of(x), m0, m1, w.K, first, last, to); });
    for_weight_rows(w, kBlockedWeights, [&](const float* absmax, int64_t n0, int64_t n1) {
      Scratch room(blocked_room(m1 - m0, w.K / w.packed.block_size));
      kernel.forward(to, m1 - m0, w.K, w.packed, absmax, n0, n1, room, row_of(y, m0), type_of(y), y.stride(0));
    });
  }
}

// dx bf16 = dy w
void multiply_columns_tiled(const Weight& w, const Tensor& dy, const Tensor& dx) {
  const FourBitKernels& kernel = four_bit();
  const int64_t row_blocks = w.K / w.packed.block_size;
  Scratch absmax(w.N * row_blocks);
  parallel((w.N + kRows - 1) / kRows, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kRows * row_blocks, end = std::min(last * kRows, w.N) * row_blocks;
    kernel.absmax(w.packed.absmax, begin, end, absmax + begin);
  });
  const auto arrange = [&](const Rows& rows, int64_t m0, int64_t m1, uint32_t* to) { kernel.tiles->arrange_backward(rows, m0, m1, w.N, to); };
  for_tiled_groups(dy, arrange, [&](int64_t m0, int64_t m1, const uint32_t* rows) {
    parallel((w.K + kTiledStrip - 1) / kTiledStrip, [&](int64_t first, int64_t last) {
      Scratch room(tiled_room(w.N) + tiled_rows(m1 - m0) * kTiledColumns);
      for (int64_t task = first; task < last; ++task)
        kernel.tiles->backward(rows, m1 - m0, w.N, w.K, w.packed, absmax, task * kTiledStrip, room, row_of(dx, m0), type_of(dx), dx.stride(0));
    });
  });
}

// y += bias, each row in fp32.
void add_bias(const Tensor& y, const optional<Tensor>& bias) {
  const auto start = start_row(bias, {}, y.size(1), 1.0f);
  if (!start) return;
  const int64_t N = y.size(1);
  parallel_rows(y.size(0), [&](int64_t m0, int64_t m1) {
    kernels().expand(nullptr, 0, m0, m1, 0, nullptr, padded(N), start->data, 1.0f, kAll, true, y.mutable_data_ptr(), type_of(y), N, N);
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
      float* own = parts.clear(task);
      for_blocks(tasks.begin(task), tasks.begin(task + 1), [&](int64_t m0, int64_t m1) {
        kernels().reduce(rows_of(dy), m0, m1, N, kAll, nullptr, 0, 0, 1.0f, nullptr, nullptr, 0, nullptr, 0, own);
      });
    }
  });
  parts.finish(sums, 1.0f, false);
  return sums;
}

std::tuple<Tensor, Tensor> linear4bit_fwd(Tensor x, Tensor packed, std::vector<Tensor> scales, std::string quant_type, int64_t block_size,
                                          int64_t N, optional<Tensor> a, optional<Tensor> b, optional<Tensor> bias,
                                          optional<Tensor> lora_bias, double scale, double p, optional<Tensor> seed) {
  const int64_t M = x.size(0), K = x.size(1);
  const Weight w = {packed_of(packed, scales, quant_type, block_size), N, K};
  const Type type = type_of(x);
  const Way way = way_of(M, K, type, block_size);
  const bool own = way == Way::tiles || way == Way::blocks;  // they round to bf16 themselves
  const bool few = way == Way::bytes || way == Way::nibbles || (own && M <= kFewRows);
  const bool direct = !few && (own || native(type));
  // In x's own type where the vendor GEMM writes it, in fp32 else.
  Tensor y = empty({M, N}, direct ? x.scalar_type() : ScalarType::Float), s = nothing(x);
  if (M && N && !(way == Way::bytes && multiply_bytes(w, x, y))) {
    switch (way_of(M, K, type, block_size, false)) {
      case Way::tiles: multiply_rows_tiled(w, x, y); break;
      case Way::nibbles: multiply_nibbles(w, x, y); break;
      case Way::blocks: multiply_rows_blocked(w, x, y); break;
      default: multiply_rows(w, direct ? x : to_f32(x), y);
    }
  }
  if (a) s = adapter_fwd(x, *a, *b, bias, lora_bias, scale, p, seed, y, true);
  else add_bias(y, bias);
  if (y.scalar_type() == x.scalar_type()) return {y, s};
  Tensor out = empty_like(x, {M, N});
  from_f32(y, out);
  return {out, s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear4bit_bwd(Tensor dy, Tensor x, Tensor packed, std::vector<Tensor> scales,
                                                          std::string quant_type, int64_t block_size, int64_t K, optional<Tensor> a,
                                                          optional<Tensor> b, Tensor s, double scale, double p, optional<Tensor> seed,
                                                          bool need_dx, bool need_da, bool need_db, bool need_bias) {
  const int64_t M = dy.size(0), N = dy.size(1);
  const Weight w = {packed_of(packed, scales, quant_type, block_size), N, K};
  const bool by_tiles = N && tiled(M, kTiledBackwardRows, K, type_of(dy), block_size), direct = by_tiles || native(type_of(dy));
  const Tensor dx = need_dx ? empty_like(dy, {M, K}) : nothing(dy);
  const Tensor sum = need_dx && !direct ? empty({M, K}, ScalarType::Float) : dx;
  if (need_dx && M && K) {
    if (by_tiles) multiply_columns_tiled(w, dy, sum);
    else multiply_columns(w, direct ? dy : to_f32(dy), sum);
  }
  AdapterGrads grads = {nothing(dy), nothing(dy), empty({0}, ScalarType::Float)};
  if (a) grads = adapter_bwd(dy, x, *a, *b, s, scale, p, seed, {need_dx, need_da, need_db, need_bias}, sum, true);
  else if (need_bias) grads.bias = column_sums(dy);
  if (need_dx && !direct) from_f32(sum, dx);
  return {dx, grads.da, grads.db, grads.bias};
}

}  // namespace

// The way of a forward pass, for people to read.
std::string linear4bit_way(int64_t M, int64_t K, const std::string& dtype, int64_t block_size) {
  if (dtype != "float32" && dtype != "bfloat16" && dtype != "float16")
    throw std::invalid_argument("linear4bit_way: dtype must be float32, bfloat16 or float16, got " + dtype);
  const Type type = dtype == "bfloat16" ? Type::bf16 : dtype == "float16" ? Type::f16 : Type::f32;
  switch (way_of(M, K, type, block_size)) {
    case Way::bytes: return "bytes";
    case Way::tiles: return "tiles";
    case Way::nibbles: return "nibbles";
    case Way::blocks: return "blocks";
    default: return "panels";
  }
}

STABLE_TORCH_LIBRARY_IMPL(fastpeft_cpp, CPU, m) {
  m.impl("linear4bit_fwd", TORCH_BOX(&linear4bit_fwd));
  m.impl("linear4bit_bwd", TORCH_BOX(&linear4bit_bwd));
}

}  // namespace fastpeft
