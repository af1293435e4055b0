// Shared by the products with a 4-bit weight: a table of code pairs, the rank-R term, and the sum of spans.
#pragma once
#include "cuda/fourbit_device.cuh"

namespace fastpeft {

constexpr int kCodeTable = 256 * 16;  // pairs: a copy for every lane of a half-warp, in its own banks

// Entry 16 i + lane: the two codes of byte i.
__device__ __forceinline__ void fill_codes(float2* table, int quant_type, int tid, int threads) {
  for (int i = tid; i < kCodeTable; i += threads)
    table[i] = make_float2(kCodes[quant_type][i >> 8], kCodes[quant_type][i >> 4 & 15]);
}

// y's rank-R term: scale · s [M, R] bᵀ, R = 0 for none.
struct Adapter {
  AnyMatrix s, b;
  float scale;
  int R;
};

// The result of a product: out [M, columns], from one sum, or from `spans` sums in scratch, fp32 [spans, M, columns].
template <class T>
struct Output {
  T* out;
  int64_t stride;
  AnyMatrix bias;
  bool accumulate;
  float* scratch;
  int M;
  int64_t columns;

  __device__ __forceinline__ void write(int m, int64_t column, float sum) const {
    T* to = out + m * stride + column;
    if (bias.data) sum += bias.at(0, column);
    if (accumulate) sum += to_f32(*to);
    ptx::store(to, from_f32<T>(sum));
  }
  __device__ __forceinline__ float* partial(int span, int m) const {
    return scratch + (static_cast<int64_t>(span) * M + m) * columns;
  }
};

namespace {

constexpr int kSumThreads = 256;

// Adds the spans in order.
template <class T>
__global__ void __launch_bounds__(kSumThreads) _linear4bit_sum_spans_kernel(Output<T> to, int spans) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int m = static_cast<int>(blockIdx.y);
  if (column >= to.columns) return;
  float sum = 0.0f;
  for (int span = 0; span < spans; ++span) sum += ptx::load(to.partial(span, m) + column);
  to.write(m, column, sum);
}

template <class T>
cudaError_t sum_spans(const Output<T>& to, int64_t spans, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((to.columns + kSumThreads - 1) / kSumThreads), static_cast<unsigned>(to.M));
  return FP_LAUNCH(_linear4bit_sum_spans_kernel<T>, grid, dim3(kSumThreads), size_t{0}, stream, to,
                   static_cast<int>(spans));
}

}  // namespace

constexpr int64_t kMaxSpans = 64;

// The number of spans with the lowest `cost(spans)` for a sum of `steps` steps: at most kMaxSpans, none of them empty.
template <class Cost>
int64_t best_spans(int64_t steps, int64_t max_spans, Cost cost) {
  int64_t best = 1;
  for (int64_t spans = 2; spans <= max_spans && spans <= kMaxSpans; ++spans) {
    const int64_t per_span = (steps + spans - 1) / spans;
    if ((steps + per_span - 1) / per_span == spans && cost(spans) < cost(best)) best = spans;
  }
  return best;
}

inline int processor_count() {
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  return processors;
}

}  // namespace fastpeft
