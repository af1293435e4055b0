// Chooses and runs the path of a product with a 4-bit weight on a CPU.
//
// On every path a piece of W is decoded into registers or into a buffer that stays in a cache: W in 16 bits is neither
// written to memory nor read from it.
#include "cpu/linear4bit_paths.h"

#include <atomic>
#include <optional>
#include <stdexcept>

#include "host/gemm.h"

namespace fastpeft {
namespace {

// Work is split into at least so many tasks, so that every thread gets some, even if they are then smaller than ideal.
constexpr int64_t kTasks = 16;
// The rows up to which gemm writes fp32, which is rounded once, after the adapter: so few cost little.
constexpr int64_t kWideRows = 64;
// Bytes of a panel. Every panel reads all rows of x again: at 1024 rows and K = N = 4096 the backward pass takes 47 ms
// with 1 MiB, 38 ms with 2 MiB and as much with 8 MiB.
constexpr int64_t kPanelBytes = 1 << 21;

constexpr Path kPaths[] = {Path::gemv, Path::fused, Path::panels};
std::atomic<int> forced{-1};  // a place in kPaths

bool has_whole_blocks(int64_t K, int64_t block_size) { return K && K % block_size == 0; }

bool serves_forward(Path path, int64_t K, Type type, int64_t block_size) {
  if (path == Path::panels) return true;
  if (!has_whole_blocks(K, block_size)) return false;
  return path == Path::gemv || (four_bit().gemm && type == Type::bf16 && block_size >= four_bit().gemm->min_block);
}

bool serves_backward(Path path, int64_t N, int64_t K, Type type, int64_t block_size) {
  if (path == Path::panels) return true;
  if (path == Path::gemv || N == 0 || !has_whole_blocks(K, block_size)) return false;
  return four_bit().gemm && type == Type::bf16 && block_size >= four_bit().gemm->min_block_backward;
}

std::optional<Path> forced_path() {
  const int at = forced.load(std::memory_order_relaxed);
  return at < 0 ? std::nullopt : std::optional<Path>(kPaths[at]);
}

[[noreturn]] void cannot(Path path, const char* pass) {
  throw std::runtime_error("set_fourbit_path: the path of a " + std::string(pass) +
                           " pass must serve its shape and dtype on this processor, got '" + name_of(path) + "'");
}

// W[n0 : n1, k0 : k1] to [n1 - n0, k1 - k0].
void decode(const Weight& w, int64_t n0, int64_t n1, int64_t k0, int64_t k1, const Tensor& out) {
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const Type type = type_of(out);
  const int64_t width = k1 - k0, grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, width));
  parallel((n1 - n0 + grain - 1) / grain, [&](int64_t first, int64_t last) {
    const int64_t begin = n0 + first * grain, end = std::min(n1, n0 + last * grain);
    char* to = data + (begin - n0) * width * size_of(type);
    const bool contiguous = width == w.K;
    four_bit().decode(w.packed, begin * w.K + k0, contiguous ? (end - begin) * w.K : width,
                      contiguous ? 1 : end - begin, w.K, to, type);
  });
}

// The rows (or columns) of a panel of `other` values each: whole blocks of 64.
int64_t panel_width(int64_t other, Type type) {
  return std::max<int64_t>(64, kPanelBytes / (std::max<int64_t>(1, other) * size_of(type)) / 64 * 64);
}

void panels_forward(const Weight& w, const Tensor& x, const Tensor& y) {
  const int64_t step = std::min(w.N, panel_width(w.K, type_of(x)));
  const Temporary panel(step, w.K, x.scalar_type());
  for (int64_t n = 0; n < w.N; n += step) {
    const int64_t count = std::min(step, w.N - n);
    decode(w, n, n + count, 0, w.K, panel);
    gemm(columns(y, n, count), x, transpose(rows(panel, 0, count)), 0.0);
  }
}

// A panel of columns of W at a time: with panels of rows, the partial sums would be rounded each time.
void panels_backward(const Weight& w, const Tensor& dy, const Tensor& dx) {
  const int64_t step = std::min(w.K, panel_width(w.N, type_of(dy)));
  for (int64_t k = 0; k < w.K; k += step) {
    const int64_t count = std::min(step, w.K - k);
    const Temporary panel(w.N, count, dy.scalar_type());
    decode(w, 0, w.N, k, k + count, panel);
    gemm(columns(dx, k, count), dy, panel, 0.0);
  }
}

// f(x, converted to fp32 if the result is in fp32).
template <class F>
void in_type_of(const Tensor& result, const Tensor& x, F f) {
  if (result.scalar_type() == x.scalar_type()) f(x);
  else f(to_f32(x));
}

// product(absmax of the blocks of rows [n0, n1) of W, n0, n1) for `step` rows at a time.
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

// y in fp32. A task takes up to 128 rows of W and multiplies two at a time, one from each half: the hardware's
// prefetcher follows only long runs.
void gemv_forward(const Weight& w, const Tensor& x, const Tensor& y) {
  const FourBitGemv& kernel = *four_bit().gemv;
  const int64_t M = x.size(0), step = std::clamp<int64_t>(w.N / kTasks / 2 * 2, 16, 128);
  Scratch packed(M * whole_chunks(w.K));
  const GemvFormat format = kernel.pack(rows_of(x), w.K, w.packed.block_size, packed);
  float* out = static_cast<float*>(y.mutable_data_ptr());
  for_weight_rows(w, step, [&](const float* absmax, int64_t n0, int64_t n1) {
    kernel.multiply(format, packed, M, w.K, w.packed, absmax, n0, n1, out, w.N);
  });
}

// f(m0, m1, rows [m0, m1) of x packed by `pack`) for groups of rows.
template <class Pack, class F>
void for_groups(const Tensor& x, Pack pack, F f) {
  const int64_t M = x.size(0), width = x.size(1), group = four_bit().gemm->group_rows;
  for (int64_t m0 = 0; m0 < M; m0 += group) {
    const int64_t m1 = std::min(m0 + group, M);
    Scratch packed(packed_words(m1 - m0, width));
    uint32_t* const to = reinterpret_cast<uint32_t*>(packed.data);
    parallel(whole_chunks(width) / kChunk,
             [&](int64_t first, int64_t last) { pack(rows_of(x), m0, m1, width, first, last, to); });
    f(m0, m1, to);
  }
}

char* row_of(const Tensor& t, int64_t m) {
  return static_cast<char*>(t.mutable_data_ptr()) + m * t.stride(0) * size_of(type_of(t));
}

// y in fp32 or bf16.
void fused_forward(const Weight& w, const Tensor& x, const Tensor& y) {
  const FourBitGemm& kernel = *four_bit().gemm;
  for_groups(x, kernel.pack_forward, [&](int64_t m0, int64_t m1, const uint32_t* packed) {
    for_weight_rows(w, kernel.weight_rows(m1 - m0), [&](const float* absmax, int64_t n0, int64_t n1) {
      Scratch scratch(kernel.forward_scratch(m1 - m0, w.K / w.packed.block_size));
      kernel.forward(packed, m1 - m0, w.K, w.packed, absmax, n0, n1, scratch, row_of(y, m0), type_of(y), y.stride(0));
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

// f(scratch of `floats`, k0, k1) for every strip of columns of W.
template <class F>
void for_strips(const Weight& w, int64_t floats, F f) {
  const int64_t width = std::clamp<int64_t>(w.K / kTasks / kStripPart * kStripPart, kStripPart, kStrip);
  parallel((w.K + width - 1) / width, [&](int64_t first, int64_t last) {
    Scratch scratch(floats);
    for (int64_t k0 = first * width; k0 < std::min(last * width, w.K); k0 += width)
      f(static_cast<float*>(scratch), k0, std::min(k0 + width, w.K));
  });
}

// dx in bf16.
void fused_backward(const Weight& w, const Tensor& dy, const Tensor& dx) {
  const FourBitGemm& kernel = *four_bit().gemm;
  Scratch absmax(w.N * (w.K / w.packed.block_size));
  decode_absmax(w, absmax);
  for_groups(dy, kernel.pack_backward, [&](int64_t m0, int64_t m1, const uint32_t* packed) {
    for_strips(w, strip_floats(w.N) + padded_rows(m1 - m0) * kStripPart, [&](float* scratch, int64_t k0, int64_t k1) {
      kernel.backward(packed, m1 - m0, w.N, w.K, w.packed, absmax, k0, k1, scratch, row_of(dx, m0), type_of(dx),
                      dx.stride(0));
    });
  });
}

}  // namespace

std::string name_of(Path path) { return path == Path::gemv ? "gemv" : path == Path::fused ? "fused" : "panels"; }

bool set_fourbit_path(const std::string& name) {
  int at = -1;
  for (int i = 0; i < 3; ++i)
    if (name == name_of(kPaths[i])) at = i;
  if (at < 0 && name != "auto") return false;
  forced.store(at, std::memory_order_relaxed);
  return true;
}

Path forward_path(int64_t M, int64_t K, Type type, int64_t block_size) {
  if (const auto path = forced_path()) {
    if (!serves_forward(*path, K, type, block_size)) cannot(*path, "forward");
    return *path;
  }
  if (serves_forward(Path::gemv, K, type, block_size) && M <= four_bit().gemv->max_rows(type, block_size))
    return Path::gemv;
  if (serves_forward(Path::fused, K, type, block_size) && M <= four_bit().gemm->max_rows) return Path::fused;
  return Path::panels;
}

Path backward_path(int64_t M, int64_t N, int64_t K, Type type, int64_t block_size) {
  if (const auto path = forced_path()) {
    if (!serves_backward(*path, N, K, type, block_size)) cannot(*path, "backward");
    return *path;
  }
  if (serves_backward(Path::fused, N, K, type, block_size) && M <= four_bit().gemm->max_rows_backward)
    return Path::fused;
  return Path::panels;
}

bool writes_type_of_x(Path path, int64_t M, Type type) {
  if (path == Path::panels) return native(type);
  return path == Path::fused && M > kWideRows;
}

void multiply_forward(Path path, const Weight& w, const Tensor& x, const Tensor& y) {
  switch (path) {
    case Path::gemv: return gemv_forward(w, x, y);
    case Path::fused: return fused_forward(w, x, y);
    default: return in_type_of(y, x, [&](const Tensor& same) { panels_forward(w, same, y); });
  }
}

void multiply_backward(Path path, const Weight& w, const Tensor& dy, const Tensor& dx) {
  if (path == Path::fused) return fused_backward(w, dy, dx);
  in_type_of(dx, dy, [&](const Tensor& same) { panels_backward(w, same, dx); });
}

}  // namespace fastpeft
