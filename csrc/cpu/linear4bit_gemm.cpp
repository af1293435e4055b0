// Which way a product of a 4-bit weight is made on the CPU: one or two rows of x in products of bytes and up to some hundred on tile
// registers, where there are such; else a few on the nibbles as they lie, and more block by block where vectors multiply bf16, else
// through panels of W and the vendor GEMM.
//
// A block or panel of W is decoded into a buffer that stays in a cache, so that W in 16 bits is neither written to memory nor read from it.
#include "cpu/linear4bit_gemm.h"

#include "host/gemm.h"

namespace fastpeft {
namespace {

// The tasks that there should be, for all threads to have some, before the tasks are as large as they had better be.
constexpr int64_t kTasks = 16;
// The rows of W of a task, of which two are multiplied at a time, of either half one: so long a run the hardware's prefetcher follows.
int64_t weight_rows(int64_t N) { return std::clamp<int64_t>(N / kTasks / 2 * 2, 16, 128); }
// The rows up to which tiles and blocks write fp32, which is rounded once, after the adapter: there is little of it.
constexpr int64_t kFewRows = 64;
// The rows that blocks take at a time, each of which reads them all again.
constexpr int64_t kBlockedRows = 256;
// The rows up to which tiles, which decode W again for every kTiledGroup rows, are faster than panels: measured at K = N = 4096.
constexpr int64_t kTiledForwardRows = 512, kTiledBackwardRows = 256;
// Bytes of a panel, against the rows that every panel reads again: at 1024 rows and K = N = 4096 the backward pass takes 47 ms with
// 1 MiB, 38 with 2 MiB and as much with 8.
constexpr int64_t kPanelBytes = 1 << 21;

// W[n0 : n1, k0 : k1] to [n1 - n0, k1 - k0].
void decode(const Weight& w, int64_t n0, int64_t n1, int64_t k0, int64_t k1, const Tensor& out) {
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const Type type = type_of(out);
  const int64_t width = k1 - k0, grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, width));
  parallel((n1 - n0 + grain - 1) / grain, [&](int64_t first, int64_t last) {
    const int64_t begin = n0 + first * grain, end = std::min(n1, n0 + last * grain);
    char* to = data + (begin - n0) * width * size_of(type);
    const bool whole = width == w.K;
    four_bit().decode(w.packed, begin * w.K + k0, whole ? (end - begin) * w.K : width, whole ? 1 : end - begin, w.K, to, type);
  });
}

// The rows (or columns) of a panel of `other` values each: whole blocks of 64.
int64_t panel_width(int64_t other, Type type) { return std::max<int64_t>(64, kPanelBytes / (std::max<int64_t>(1, other) * size_of(type)) / 64 * 64); }

// y = x wᵀ
void multiply_rows_by_panels(const Weight& w, const Tensor& x, const Tensor& y) {
  const int64_t step = std::min(w.N, panel_width(w.K, type_of(x)));
  const Temporary panel(step, w.K, x.scalar_type());
  for (int64_t n = 0; n < w.N; n += step) {
    const int64_t count = std::min(step, w.N - n);
    decode(w, n, n + count, 0, w.K, panel);
    gemm(columns(y, n, count), x, transpose(rows(panel, 0, count)), 0.0);
  }
}

// dx = dy w, a panel of columns of w at a time: over rows, the partial sums would be rounded each time.
void multiply_columns_by_panels(const Weight& w, const Tensor& dy, const Tensor& dx) {
  const int64_t step = std::min(w.K, panel_width(w.N, type_of(dy)));
  for (int64_t k = 0; k < w.K; k += step) {
    const int64_t count = std::min(step, w.K - k);
    const Temporary panel(w.N, count, dy.scalar_type());
    decode(w, 0, w.N, k, k + count, panel);
    gemm(columns(dx, k, count), dy, panel, 0.0);
  }
}

// Whether tiles, and blocks backward, multiply such rows with such a weight.
bool in_wide_blocks(int64_t K, Type type, int64_t block_size) {
  return type == Type::bf16 && block_size >= kLeastTiledBlock && K % block_size == 0;
}

// Of M rows, `most` at most.
bool tiled(int64_t M, int64_t most, int64_t K, Type type, int64_t block_size) {
  return M <= most && four_bit().tiles && in_wide_blocks(K, type, block_size);
}

// Of the forward pass, of rows that may be anything.
Way way_of_any(int64_t M, int64_t K, Type type, int64_t block_size) {
  if (K == 0 || K % block_size) return Way::panels;  // a product of nothing is the vendor GEMM's zeros
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
  for_weight_rows(w, weight_rows(w.N), [&](const float* absmax, int64_t n0, int64_t n1) {
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
  const int64_t step = weight_rows(w.N);
  parallel((w.N + step - 1) / step, [&](int64_t first, int64_t last) {
    kernel.product(room, M, w.K, w.packed, first * step, std::min(last * step, w.N), out, w.N);
  });
  return true;
}

// f(m0, m1, those rows of x in a kernel's order, which arrange(m0, m1, to) gives) for groups of `most` rows at most.
template <class Arrange, class F>
void for_groups(const Tensor& x, int64_t most, Arrange arrange, F f) {
  const int64_t M = x.size(0), width = x.size(1);
  for (int64_t m0 = 0; m0 < M; m0 += most) {
    const int64_t m1 = std::min(m0 + most, M);
    Scratch rows(tiled_floats(m1 - m0, width));
    uint32_t* const to = reinterpret_cast<uint32_t*>(rows.data);
    arrange(m0, m1, to);
    f(m0, m1, to);
  }
}

// Such an `arrange` of blocks, by many threads.
template <class Kernel>
auto blocked_order(const Tensor& x, Kernel arrange) {
  return [&x, arrange](int64_t m0, int64_t m1, uint32_t* to) {
    const int64_t width = x.size(1);
    parallel(arranged(width) / kBlockedColumns, [&](int64_t first, int64_t last) { arrange(rows_of(x), m0, m1, width, first, last, to); });
  };
}

char* row_of(const Tensor& t, int64_t m) { return static_cast<char*>(t.mutable_data_ptr()) + m * t.stride(0) * size_of(type_of(t)); }

// y fp32 or bf16 = x wᵀ
void multiply_rows_by_tiles(const Weight& w, const Tensor& x, const Tensor& y) {
  const FourBitTiles& kernel = *four_bit().tiles;
  const auto arrange = [&](int64_t m0, int64_t m1, uint32_t* to) {
    kernel.arrange_forward(rows_of(x), m0, m1, w.K, w.packed.block_size, to);
  };
  for_groups(x, kTiledGroup, arrange, [&](int64_t m0, int64_t m1, const uint32_t* rows) {
    for_weight_rows(w, tiled_weights(m1 - m0), [&](const float* absmax, int64_t n0, int64_t n1) {
      kernel.forward(rows, m1 - m0, w.K, w.packed, absmax, n0, n1, row_of(y, m0), type_of(y), y.stride(0));
    });
  });
}

void multiply_rows_by_blocks(const Weight& w, const Tensor& x, const Tensor& y) {
  const FourBitBlocks& kernel = *four_bit().blocks;
  for_groups(x, kBlockedRows, blocked_order(x, kernel.arrange_forward), [&](int64_t m0, int64_t m1, const uint32_t* rows) {
    for_weight_rows(w, kBlockedWeights, [&](const float* absmax, int64_t n0, int64_t n1) {
      Scratch room(blocked_room(m1 - m0, w.K / w.packed.block_size));
      kernel.forward(rows, m1 - m0, w.K, w.packed, absmax, n0, n1, room, row_of(y, m0), type_of(y), y.stride(0));
    });
  });
}

// absmax of all blocks of W, to `out`.
void decode_absmax(const Weight& w, float* out) {
  const int64_t row_blocks = w.K / w.packed.block_size;
  parallel((w.N + kRows - 1) / kRows, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kRows * row_blocks, end = std::min(last * kRows, w.N) * row_blocks;
    four_bit().absmax(w.packed.absmax, begin, end, out + begin);
  });
}

// f(room of `floats`, k0, k1) for every strip of columns of W.
template <class F>
void for_strips(const Weight& w, int64_t floats, F f) {
  const int64_t width = std::clamp<int64_t>(w.K / kTasks / kStripPart * kStripPart, kStripPart, kStrip);
  parallel((w.K + width - 1) / width, [&](int64_t first, int64_t last) {
    Scratch room(floats);
    for (int64_t k0 = first * width; k0 < std::min(last * width, w.K); k0 += width) f(static_cast<float*>(room), k0, std::min(k0 + width, w.K));
  });
}

// dx bf16 = dy w, by the `backward` of tiles or of blocks, of which rows are arranged for groups as above.
template <class Arrange, class Backward>
void multiply_strips(const Weight& w, const Tensor& dy, const Tensor& dx, int64_t most, Arrange arrange, Backward backward) {
  Scratch absmax(w.N * (w.K / w.packed.block_size));
  decode_absmax(w, absmax);
  for_groups(dy, most, arrange, [&](int64_t m0, int64_t m1, const uint32_t* rows) {
    for_strips(w, strip_room(w.N) + tiled_rows(m1 - m0) * kStripPart, [&](float* room, int64_t k0, int64_t k1) {
      backward(rows, m1 - m0, w.N, w.K, w.packed, absmax, k0, k1, room, row_of(dx, m0), type_of(dx), dx.stride(0));
    });
  });
}

// f(x in the type of a result, its own or fp32).
template <class F>
void in_type_of(const Tensor& result, const Tensor& x, F f) {
  if (result.scalar_type() == x.scalar_type()) f(x);
  else f(to_f32(x));
}

void multiply_columns_by_tiles(const Weight& w, const Tensor& dy, const Tensor& dx) {
  const FourBitTiles& kernel = *four_bit().tiles;
  const auto arrange = [&](int64_t m0, int64_t m1, uint32_t* to) { kernel.arrange_backward(rows_of(dy), m0, m1, w.N, to); };
  multiply_strips(w, dy, dx, kTiledGroup, arrange, kernel.backward);
}

void multiply_columns_by_blocks(const Weight& w, const Tensor& dy, const Tensor& dx) {
  const FourBitBlocks& kernel = *four_bit().blocks;
  multiply_strips(w, dy, dx, kBlockedRows, blocked_order(dy, kernel.arrange_backward), kernel.backward);
}

}  // namespace

Way way_of(int64_t M, int64_t K, Type type, int64_t block_size) {
  const bool whole = K && K % block_size == 0;
  if (whole && four_bit().bytes && M <= kByteRows && type == Type::bf16 && block_size >= kLeastTiledBlock) return Way::bytes;
  return way_of_any(M, K, type, block_size);
}

Way way_back(int64_t M, int64_t N, int64_t K, Type type, int64_t block_size) {
  if (N == 0) return Way::panels;
  if (tiled(M, kTiledBackwardRows, K, type, block_size)) return Way::tiles;
  return four_bit().blocks && in_wide_blocks(K, type, block_size) ? Way::blocks : Way::panels;
}

bool in_own_type(Way way, int64_t M, Type type) {
  if (way == Way::panels) return native(type);
  return M > kFewRows && (way == Way::tiles || way == Way::blocks);
}

void multiply_rows(Way way, const Weight& w, const Tensor& x, const Tensor& y) {
  if (way == Way::bytes) {
    if (multiply_bytes(w, x, y)) return;
    way = way_of_any(x.size(0), w.K, type_of(x), w.packed.block_size);
  }
  switch (way) {
    case Way::tiles: return multiply_rows_by_tiles(w, x, y);
    case Way::blocks: return multiply_rows_by_blocks(w, x, y);
    case Way::nibbles: return multiply_nibbles(w, x, y);
    default: return in_type_of(y, x, [&](const Tensor& own) { multiply_rows_by_panels(w, own, y); });
  }
}

void multiply_columns(Way way, const Weight& w, const Tensor& dy, const Tensor& dx) {
  switch (way) {
    case Way::tiles: return multiply_columns_by_tiles(w, dy, dx);
    case Way::blocks: return multiply_columns_by_blocks(w, dy, dx);
    default: return in_type_of(dx, dy, [&](const Tensor& own) { multiply_columns_by_panels(w, own, dx); });
  }
}

}  // namespace fastpeft
