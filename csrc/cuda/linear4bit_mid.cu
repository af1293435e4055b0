// y [M, N] = x Wᵀ + scale · s bᵀ + bias for up to 512 rows, straight from the bytes of a 4-bit weight.
//
// Between memory and matrix units: 2 M N K FLOP by mma.sync, and for every 128 rows of x once N K / 2 bytes of packed,
// which thread blocks that share them read at about the same time; x once for every 256 columns, from L2. The weight in
// 16 bits is never stored: dequantising it first writes and reads 4 bytes a weight, eight times what is read here. What
// is multiplied are the values that dequantize_4bit would write.
//
// A thread block owns 128 x 256 values of y; 64 values of k of x and of packed at a time go through a ring of kStages
// in shared memory, filled by cp.async. The weight is the A operand of mma.m16n8k16, and the sum over k runs in the
// order that lets lane 4g + t take its bytes k = 16t .. 16t + 15 of a row as they lie. A byte becomes two fp32 codes by
// a table with a copy for every lane of a half-warp; they are scaled and rounded once, to one register of the fragment.
// (absmax times sums of 64 products, as in linear4bit_small.cu, would need more registers than are left beside acc.)
// The same order gives a lane 16 neighbouring values of a row of x: a 16-byte load is the B fragments of two products,
// as many bytes as ldmatrix would load, and neither operand is shuffled. Granule i of row m is at i ^ (m & 1), so that
// eight lanes read eight different quarters of two lines. A thread keeps the absmax of one row, a chunk ahead. Where
// the tiles of y are few, `spans` thread blocks split K, and a second launch adds their sums in order. Nothing here is
// timed yet.
#include "cuda/linear4bit_device.cuh"

namespace fastpeft {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 64;  // values of k at a time
constexpr int kStages = 2;
constexpr int kWarpsN = 4, kWarpsM = 2, NT = 4, MT = 8;  // warps of 4 x 16 rows of W and 8 x 8 rows of x
constexpr int kTileN = kWarpsN * NT * 16, kTileM = kWarpsM * MT * 8;
constexpr int kStageX = kTileM * kChunk * 2, kStageW = kTileN * kChunk / 2;  // bytes
constexpr int kSumStride = kTileN + 4;  // lanes 4g + t write at 2t kSumStride + g: 32 different banks
constexpr int kRing = kStages * (kStageX + kStageW), kTables = (2 * kCodeTable + 256 + 2 * kTileN) * 4;
constexpr int kShared = kTables + kRing;
static_assert(kThreads == kTileN && kThreads == 32 * kWarpsN * kWarpsM, "a thread keeps the absmax of a row");
static_assert(kShared <= 99 * 1024, "what sm_86, sm_89 and sm_120 give a thread block");
static_assert(MT * 8 * kSumStride * 4 <= kShared, "at the end the sums of half the rows of x lie over all of it");

template <class T>
struct Arguments {
  Weight4bit w;
  const T* x;
  uint32_t x_stride;
  Adapter adapter;
  Output<T> to;
  int M, m_tiles, chunks, span;  // K = 64 chunks, of which a thread block takes span
  int N;
};

// Starts to load chunk `chunk` of the thread block's rows of x and packed; rows past the end are zero.
template <class T>
__device__ __forceinline__ void ask(const Arguments<T>& arg, unsigned char* ring, int slot, int chunk, int first_m,
                                    int first_n) {
  const int tid = static_cast<int>(threadIdx.x);
  T* x = reinterpret_cast<T*>(ring + slot * kStageX);
  unsigned char* packed = ring + kStages * kStageX + slot * kStageW;
#pragma unroll
  for (int i = 0; i < kTileM * 8 / kThreads; ++i) {
    const int row = tid / 8 + i * (kThreads / 8), granule = tid % 8, m = first_m + row;
    const uint32_t from = static_cast<uint32_t>(min(m, arg.M - 1)) * arg.x_stride + chunk * kChunk + granule * 8;
    ptx::cp_async16(x + row * kChunk + (granule ^ (row & 1)) * 8, arg.x + from, m < arg.M ? 16 : 0);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = tid / 2 + i * (kTileN / 2), n = first_n + row;
    const uint32_t from = static_cast<uint32_t>(min(n, arg.N - 1)) * static_cast<uint32_t>(arg.chunks) + chunk;
    ptx::cp_async16(packed + row * (kChunk / 2) + tid % 2 * 16,
                    reinterpret_cast<const uint4*>(arg.w.packed) + (2 * from + tid % 2), n < arg.N ? 16 : 0);
  }
}

// acc += W xᵀ over one chunk, for this warp.
template <class T>
__device__ __forceinline__ void multiply(const T* x, const unsigned char* packed, const float* absmax,
                                         const float2* codes, int g, int t, float (&acc)[NT][MT][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[NT][2][4];
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * j + 8 * h + g;
        const uint32_t bytes = *reinterpret_cast<const uint32_t*>(packed + row * (kChunk / 2) + 8 * t + 4 * half);
        const float factor = absmax[row];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = codes[(bytes >> (8 * i) & 0xff) * 16];
          a[j][i / 2][i % 2 * 2 + h] = pair_of<T>(__fmul_rn(pair.x, factor), __fmul_rn(pair.y, factor));
        }
      }
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const uint4 two = reinterpret_cast<const uint4*>(x + (8 * i + g) * kChunk)[(2 * t + half) ^ (g & 1)];
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        ptx::mma_m16n8k16<T>(acc[j][i], a[j][0][0], a[j][0][1], a[j][0][2], a[j][0][3], two.x, two.y);
        ptx::mma_m16n8k16<T>(acc[j][i], a[j][1][0], a[j][1][1], a[j][1][2], a[j][1][3], two.z, two.w);
      }
    }
  }
}

// acc += scale · s bᵀ over 16 of the R columns, from `first` on; those past R are zero, and so are rows past the end.
template <class T>
__device__ __forceinline__ void add_adapter(const Arguments<T>& arg, uint32_t* pairs, int first, int first_m,
                                            int first_n, int row_m, int row_n, int g, int t, float (&acc)[NT][MT][4]) {
  const Adapter& adapter = arg.adapter;
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < (kTileM + kTileN) * 8; i += kThreads) {
    const bool is_b = i >= kTileM * 8;
    const AnyMatrix& from = is_b ? adapter.b : adapter.s;
    const int row = is_b ? first_n + i / 8 - kTileM : first_m + i / 8;
    const int r = first + i % 8 * 2;
    const bool inside = row < (is_b ? arg.N : arg.M);
    pairs[i] = pair_of<T>(inside && r < adapter.R ? from.at(row, r) : 0.0f,
                          inside && r + 1 < adapter.R ? from.at(row, r + 1) : 0.0f);
  }
  __syncthreads();
  auto two = [&](int row) { return *reinterpret_cast<const uint2*>(pairs + row * 8 + 2 * t); };
#pragma unroll
  for (int j = 0; j < NT; ++j) {
    const uint2 b0 = two(kTileM + row_n + 16 * j + g), b1 = two(kTileM + row_n + 16 * j + 8 + g);
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const uint2 s = two(row_m + 8 * i + g);
      float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      ptx::mma_m16n8k16<T>(c, b0.x, b1.x, b0.y, b1.y, s.x, s.y);
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[j][i][e] = __fmaf_rn(adapter.scale, c[e], acc[j][i][e]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) _linear4bit_mid_kernel(Arguments<T> arg) {
  FP_DYNAMIC_SHARED(float, shared);
  float2* table = reinterpret_cast<float2*>(shared);
  float* code = shared + 2 * kCodeTable;
  float* absmax = code + 256;  // [2][kTileN]
  unsigned char* ring = reinterpret_cast<unsigned char*>(absmax + 2 * kTileN);
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int first_m = static_cast<int>(blockIdx.x) % arg.m_tiles * kTileM;
  const int first_n = static_cast<int>(blockIdx.x) / arg.m_tiles * kTileN;
  const int begin = static_cast<int>(blockIdx.y) * arg.span, end = min(begin + arg.span, arg.chunks);
  const int row_n = warp % kWarpsN * 16 * NT, row_m = warp / kWarpsN * 8 * MT;  // of this warp in the tile

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (begin + stage < end) ask(arg, ring, stage, begin + stage, first_m, first_n);
    ptx::cp_async_commit();
  }
  fill_codes(table, arg.w.quant_type, tid, kThreads);
  if (arg.w.codes) code[tid] = ptx::load(arg.w.code + tid);
  const float offset = arg.w.codes ? ptx::load(arg.w.offset) : 0.0f;
  __syncthreads();

  BlockScale scale = {};
  const int n = first_n + tid;
  auto fetch = [&](int chunk) {
    const uint32_t run = static_cast<uint32_t>(n) * static_cast<uint32_t>(arg.chunks) + static_cast<uint32_t>(chunk);
    if (n < arg.N && chunk < end) scale.fetch(arg.w, run >> (arg.w.log2_block - 6));
  };
  auto keep = [&](int chunk) { absmax[(chunk & 1) * kTileN + tid] = scale.value(arg.w, code, offset); };
  fetch(begin);
  keep(begin);
  fetch(begin + 1);

  float acc[NT][MT][4] = {};
  int slot = 0;
#pragma unroll 1
  for (int chunk = begin; chunk < end; ++chunk) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    const int ahead = slot == 0 ? kStages - 1 : slot - 1;
    if (chunk + kStages - 1 < end) ask(arg, ring, ahead, chunk + kStages - 1, first_m, first_n);
    ptx::cp_async_commit();
    keep(chunk + 1);
    fetch(chunk + 2);
    multiply<T>(reinterpret_cast<const T*>(ring + slot * kStageX) + row_m * kChunk,
                ring + kStages * kStageX + slot * kStageW + row_n * (kChunk / 2), absmax + (chunk & 1) * kTileN + row_n,
                table + (lane & 15), g, t, acc);
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }

  ptx::cp_async_wait<0>();
  if (blockIdx.y == 0)
    for (int first = 0; first < arg.adapter.R; first += 16)
      add_adapter<T>(arg, reinterpret_cast<uint32_t*>(ring), first, first_m, first_n, row_m, row_n, g, t, acc);

  for (int part = 0; part < kTileM; part += 8 * MT) {
    __syncthreads();
    if (row_m == part) {
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            shared[(8 * i + 2 * t + (e & 1)) * kSumStride + row_n + 16 * j + g + 8 * (e / 2)] = acc[j][i][e];
    }
    __syncthreads();
    const int column = first_n + tid;  // kThreads = kTileN
    if (column >= arg.N) continue;
    for (int row = 0; row < 8 * MT && first_m + part + row < arg.M; ++row) {
      const float sum = shared[row * kSumStride + tid];
      const int m = first_m + part + row;
      if (gridDim.y > 1) ptx::store(arg.to.partial(static_cast<int>(blockIdx.y), m) + column, sum);
      else arg.to.write(m, column, sum);
    }
  }
}

constexpr int64_t kMaxRows = 512, kMaxValues = int64_t{1} << 36;

bool serves(int64_t M, int64_t N, int64_t K) {
  return M >= 0 && M <= kMaxRows && N > 0 && K > 0 && K % kChunk == 0 && N <= kMaxValues / K && N <= INT32_MAX - kTileN;
}

int64_t tiles_of(int64_t rows, int64_t tile) { return (rows + tile - 1) / tile; }

}  // namespace
}  // namespace fastpeft

extern "C" int64_t fp_linear4bit_mid_spans(int64_t M, int64_t N, int64_t K) {
  using namespace fastpeft;
  const int processors = processor_count();
  if (!serves(M, N, K) || processors == 0) return 1;
  // FLOP: those all processors could have done in the time of the busiest one; and, at 512 FLOP a byte, the sums.
  auto cost = [&](int64_t spans) {
    const int64_t waves = (tiles_of(M, kTileM) * tiles_of(N, kTileN) * spans + processors - 1) / processors;
    return waves * processors * ((K / kChunk + spans - 1) / spans) * (2 * kTileM * kTileN * kChunk) +
           (spans > 1 ? 512 * 8 * spans * M * N : 0);
  };
  return best_spans(K / kChunk, K / kChunk / 4, cost);
}

extern "C" int fp_linear4bit_mid(const fp_weight4bit* w, const fp_matrix* x, const fp_matrix* y, const fp_matrix* s,
                                 const fp_matrix* b, const fp_matrix* bias, float scale, int accumulate, int64_t M,
                                 int64_t N, int64_t K, int64_t R, float* scratch, int64_t spans, void* stream) {
  using namespace fastpeft;
  if (M == 0 || N == 0) return cudaSuccess;
  if (!serves(M, N, K) || !valid(*w) || w->block_size < kChunk || R < 0 || R > INT32_MAX || !aligned(w->packed, 16) ||
      !aligned(x->data, 16) || x->stride % 8 || x->stride > 1 << 23 || x->type != y->type || spans < 1 ||
      spans > kMaxSpans || (spans > 1 && !scratch))
    return cudaErrorInvalidValue;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  auto go = [&](auto type) -> cudaError_t {
    using T = decltype(type);
    const bool given = s && s->data && b && b->data;
    const Adapter adapter{as_argument(s), as_argument(b), scale, given ? static_cast<int>(R) : 0};
    const Output<T> to{static_cast<T*>(y->data), y->stride, as_argument(bias), accumulate != 0, scratch,
                       static_cast<int>(M),      N};
    const int64_t chunks = K / kChunk;
    const Arguments<T> arg{as_argument(*w),
                           static_cast<const T*>(x->data),
                           static_cast<uint32_t>(x->stride),
                           adapter,
                           to,
                           static_cast<int>(M),
                           static_cast<int>(tiles_of(M, kTileM)),
                           static_cast<int>(chunks),
                           static_cast<int>((chunks + spans - 1) / spans),
                           static_cast<int>(N)};
    const auto kernel = _linear4bit_mid_kernel<T>;
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(tiles_of(M, kTileM) * tiles_of(N, kTileN)), static_cast<unsigned>(spans));
    const cudaError_t done = FP_LAUNCH(kernel, grid, dim3(kThreads), size_t{kShared}, on, arg);
    return done != cudaSuccess || spans == 1 ? done : sum_spans(to, spans, on);
  };
  if (x->type == 1) return go(bf16{});
  if (x->type == 2) return go(f16{});
  return cudaErrorInvalidValue;
}
