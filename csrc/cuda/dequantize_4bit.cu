// w[i] = round(code[nibble i] · absmax[i / block_size]) for a whole 4-bit weight, absmax doubly quantised or not, in
// one launch and equal to bitsandbytes' three to the bit (Dettmers et al. 2023, arXiv:2305.14314, eq. 6).
//
// Memory-bound. Moved: n/2 bytes of packed, n · sizeof(out) of out, and per block 1 byte of codes (4 of plain absmax);
// the nested code and scales stay in a cache. Nothing else is stored: absmax never exists in memory. A thread takes 8
// values: 4 bytes in, 16 (fp32: 32) out. Their 16 codes are in shared memory, one bank each.
#include "cuda/fourbit_device.cuh"

namespace fastpeft {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // 4-byte loads in flight a thread: 32 KiB a multiprocessor
constexpr int kValues = 8;  // of a thread at a time, inside one block: block_size >= 32
constexpr int64_t kTile = kThreads * kUnroll;

template <class T>
__device__ __forceinline__ void store_values(T* out, const float (&v)[kValues]) {
  uint4* to = reinterpret_cast<uint4*>(out);
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      ptx::store(to + i, make_uint4(__float_as_uint(v[4 * i]), __float_as_uint(v[4 * i + 1]),
                                    __float_as_uint(v[4 * i + 2]), __float_as_uint(v[4 * i + 3])));
  } else {
    ptx::store(
        to, make_uint4(pair_of<T>(v[0], v[1]), pair_of<T>(v[2], v[3]), pair_of<T>(v[4], v[5]), pair_of<T>(v[6], v[7])));
  }
}

// `groups` runs of 8 values; `row_groups` of them in a row of out, 0 where out is one run.
template <class T>
__global__ void __launch_bounds__(kThreads)
    _dequantize_4bit_kernel(Weight4bit w, T* out, int64_t groups, int tail, uint32_t row_groups, int64_t stride) {
  FP_SHARED(float, lut, [16]);
  FP_SHARED(float, code, [256]);
  const int t = static_cast<int>(threadIdx.x);
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kTile;
  const int to_block = w.log2_block - 3;
  const uint32_t* packed = reinterpret_cast<const uint32_t*>(w.packed);

  uint32_t word[kUnroll];
  BlockScale block[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = start + t + u * kThreads;
    if (i >= groups) continue;
    word[u] = ptx::load_stream(packed + i);
    block[u].fetch(w, i >> to_block);
  }
  if (t < 16) lut[t] = kCodes[w.quant_type][t];
  if (w.codes) code[t] = ptx::load(w.code + t);
  const float offset = w.codes ? ptx::load(w.offset) : 0.0f;
  __syncthreads();

  // Row and column by steps of a fixed size: a 64-bit division for every 8 values would cost more than their decoding.
  int64_t row = 0;
  uint32_t column = 0, step_rows = 0, step_columns = 0;
  if (row_groups) {
    row = start / row_groups;
    column = static_cast<uint32_t>(start - row * row_groups) + static_cast<uint32_t>(t);
    row += column / row_groups;
    column %= row_groups;
    step_rows = kThreads / row_groups;
    step_columns = kThreads % row_groups;
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = start + t + u * kThreads;
    if (i < groups) {
      const float absmax = block[u].value(w, code, offset);
      float v[kValues];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const uint32_t byte = word[u] >> (8 * b);
        v[2 * b] = __fmul_rn(lut[byte >> 4 & 15], absmax);
        v[2 * b + 1] = __fmul_rn(lut[byte & 15], absmax);
      }
      store_values(out + (row_groups ? row * stride + column * kValues : i * kValues), v);
    }
    row += step_rows;
    column += step_columns;
    if (column >= row_groups) {
      column -= row_groups;
      ++row;
    }
  }

  if (tail && blockIdx.x == gridDim.x - 1 && t < tail) {
    const int64_t i = groups * kValues + t;
    BlockScale last;
    last.fetch(w, i >> w.log2_block);
    const uint32_t byte = ptx::load(w.packed + i / 2);
    const float value = lut[t & 1 ? byte & 15 : byte >> 4];
    ptx::store(out + i, from_f32<T>(__fmul_rn(value, last.value(w, code, offset))));
  }
}

// Any alignment, any K: one value a thread at a time.
template <class T>
__global__ void __launch_bounds__(kThreads)
    _dequantize_4bit_any_kernel(Weight4bit w, T* out, int64_t n, int64_t K, int64_t stride) {
  FP_SHARED(float, lut, [16]);
  const int t = static_cast<int>(threadIdx.x);
  if (t < 16) lut[t] = kCodes[w.quant_type][t];
  const float offset = w.codes ? ptx::load(w.offset) : 0.0f;
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + t; i < n; i += step) {
    BlockScale block;
    block.fetch(w, i >> w.log2_block);
    const uint32_t byte = ptx::load(w.packed + i / 2);
    const float value = lut[i & 1 ? byte & 15 : byte >> 4];
    const int64_t row = i / K;
    ptx::store(out + row * stride + (i - row * K), from_f32<T>(__fmul_rn(value, block.value(w, w.code, offset))));
  }
}

template <class T>
cudaError_t launch(const fp_weight4bit& given, const fp_matrix& out, int64_t N, int64_t K, cudaStream_t stream) {
  const Weight4bit w = as_argument(given);
  T* data = static_cast<T*>(out.data);
  const int64_t n = N * K;
  const bool one_run = out.stride == K || N == 1;
  const bool wide = aligned(given.packed, 4) && aligned(data, 16) &&
                    (one_run || (K % kValues == 0 && out.stride % kValues == 0 && K / kValues <= INT32_MAX));
  if (!wide) {
    const int64_t blocks = (n + kThreads - 1) / kThreads, max_grid = 1 << 20;
    return FP_LAUNCH(_dequantize_4bit_any_kernel<T>, static_cast<unsigned>(blocks < max_grid ? blocks : max_grid),
                     kThreads, 0, stream, w, data, n, K, out.stride);
  }
  const int64_t groups = n / kValues, blocks = (groups + kTile - 1) / kTile;
  return FP_LAUNCH(_dequantize_4bit_kernel<T>, static_cast<unsigned>(blocks ? blocks : 1), kThreads, 0, stream, w, data,
                   groups, static_cast<int>(n % kValues), one_run ? 0 : static_cast<uint32_t>(K / kValues), out.stride);
}

constexpr int64_t kMaxValues = int64_t{1} << 40;  // 2^27 thread blocks

}  // namespace
}  // namespace fastpeft

extern "C" int fp_dequantize_4bit(const fp_weight4bit* w, const fp_matrix* out, int64_t N, int64_t K, void* stream) {
  using namespace fastpeft;
  if (N == 0 || K == 0) return cudaSuccess;
  if (N < 0 || K < 0 || K > kMaxValues || N > kMaxValues / K || out->stride < K || !valid(*w))
    return cudaErrorInvalidValue;
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (out->type) {
    case 0: return launch<float>(*w, *out, N, K, on);
    case 1: return launch<bf16>(*w, *out, N, K, on);
    case 2: return launch<f16>(*w, *out, N, K, on);
    default: return cudaErrorInvalidValue;
  }
}
