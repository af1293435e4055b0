// dx [M, K] = dy [M, N] W, or dx += dy W, for 1 <= M <= 64, straight from the bytes of a 4-bit weight.
//
// Memory-bound: N K / 2 bytes of packed and N K / block_size codes are read once, dy from a cache; 2 M N K FLOP. No
// weight is stored in 16 bits. What is multiplied are the values that dequantize_4bit would write: absmax differs along
// the sum over n, so it cannot wait for the sum as in linear4bit_small.cu, and code · absmax is rounded once, as there.
//
// The weight is the A operand of mma.m16n8k16: its 16 rows are values of k, and it sums over n. A register holds one k
// of two neighbouring n. Lane 4g + t takes the `Bytes` bytes of values k = 2 Bytes g .. of eight rows n = 8t .. 8t + 7,
// and the same eight n of dy, which are contiguous: two products over n for every byte, whose two nibbles are the rows
// g and g + 8. A byte becomes two fp32 codes by one look-up in a table of 256 pairs, with a copy for each lane of a
// half-warp (32 KiB, no two lanes in one bank); two of them, scaled, become two registers. 3 instructions a weight. The
// warps of a thread block split n, and so do `spans` thread blocks where the columns alone would leave processors idle.
// Sums are added in the order of the warps, those of spans in fp32 by a second launch in the order of the spans, so the
// bytes of dx do not change from call to call. The tiles are those that no architecture spills; none is timed yet.
#include "cuda/linear4bit_device.cuh"

namespace fastpeft {
namespace {

constexpr int kRows = 32;  // of W that a warp takes at a time
constexpr int kLaneRows = 8;

// MT tiles of 8 rows of dy; lanes take Bytes of a row of W, U steps ahead; the Warps form Groups, each with its own
// columns and a share of n.
template <int MT_, int Bytes_, int U_, int Groups_, int Warps_>
struct Tile {
  static constexpr int MT = MT_, Bytes = Bytes_, U = U_, Groups = Groups_, Warps = Warps_, kThreads = 32 * Warps_;
  static constexpr int kLaneColumns = 2 * Bytes, kWarpColumns = 8 * kLaneColumns, kColumns = Groups * kWarpColumns;
  // Column k of a sum is at k + k / kLaneColumns, and lanes write at 2t kSumStride + k: 32 different banks.
  static constexpr int kSumStride = (kWarpColumns + 8 + 11) / 16 * 16 + 4;
  static constexpr int kSums = 8 * kSumStride;  // fp32 values of a warp for one tile of rows of dy
  static constexpr int kShared = (2 * kCodeTable + 256 > Warps * kSums ? 2 * kCodeTable + 256 : Warps * kSums) * 4;
  static_assert(kShared <= 99 * 1024, "what sm_86, sm_89 and sm_120 give a thread block");
};

template <class T>
struct Arguments {
  Weight4bit w;
  const T* dy;
  Output<T> to;
  int64_t dy_stride;
  bool wide;  // rows of dy are aligned to 16 bytes
  int M, K;
  int64_t N, span;  // rows of W of a thread block, a multiple of kRows
};

// What a warp loads of W ahead of its use.
template <int Bytes>
struct Packed {
  std::conditional_t<Bytes == 8, uint2, uint32_t> bytes[kLaneRows];
  BlockScale scale[kLaneRows];

  __device__ __forceinline__ uint32_t byte(int row, int i) const {
    if constexpr (Bytes == 8) return (i < 4 ? bytes[row].x : bytes[row].y) >> (8 * (i & 3)) & 0xff;
    else return bytes[row] >> (8 * i) & 0xff;
  }
};

// Eight values of a row of dy, zero from `left` on.
template <class T>
__device__ __forceinline__ uint4 load_row(const T* from, int64_t left, bool wide) {
  if (wide && left >= 8) return ptx::load(reinterpret_cast<const uint4*>(from));
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pair[i] = pair_of<T>(2 * i < left ? to_f32(ptx::load(from + 2 * i)) : 0.0f,
                         2 * i + 1 < left ? to_f32(ptx::load(from + 2 * i + 1)) : 0.0f);
  return make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

template <class T, class Shape>
__device__ __forceinline__ void multiply(const Packed<Shape::Bytes>& packed, const float (&absmax)[kLaneRows],
                                         const float2* table, const uint4 (&dy)[Shape::MT],
                                         float (&acc)[Shape::Bytes][Shape::MT][4]) {
#pragma unroll
  for (int c = 0; c < Shape::Bytes; ++c)
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      uint32_t a[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int j = 4 * q + 2 * h;
        const float2 first = table[packed.byte(j, c) * 16], second = table[packed.byte(j + 1, c) * 16];
        a[2 * h] = pair_of<T>(__fmul_rn(first.x, absmax[j]), __fmul_rn(second.x, absmax[j + 1]));
        a[2 * h + 1] = pair_of<T>(__fmul_rn(first.y, absmax[j]), __fmul_rn(second.y, absmax[j + 1]));
      }
#pragma unroll
      for (int i = 0; i < Shape::MT; ++i)
        ptx::mma_m16n8k16<T>(acc[c][i], a[0], a[1], a[2], a[3], q ? dy[i].z : dy[i].x, q ? dy[i].w : dy[i].y);
    }
}

// Adds the warps' sums of eight rows of dy, and writes them to dx, or where there are spans to scratch.
template <class T, class Shape>
__device__ __forceinline__ void write_rows(const Arguments<T>& arg, const float* sums, int first_row) {
  constexpr int warps_n = Shape::Warps / Shape::Groups;
  for (int e = static_cast<int>(threadIdx.x); e < 8 * Shape::kColumns; e += Shape::kThreads) {
    const int m = first_row + e / Shape::kColumns, group = e % Shape::kColumns / Shape::kWarpColumns;
    const int column = e % Shape::kWarpColumns,
              k = static_cast<int>(blockIdx.x) * Shape::kColumns + e % Shape::kColumns;
    if (m >= arg.M || k >= arg.K) continue;
    const float* from = sums + group * warps_n * Shape::kSums + (m - first_row) * Shape::kSumStride + column +
                        column / Shape::kLaneColumns;
    float sum = 0.0f;
    for (int warp = 0; warp < warps_n; ++warp) sum += from[warp * Shape::kSums];
    if (gridDim.y > 1) ptx::store(arg.to.partial(static_cast<int>(blockIdx.y), m) + k, sum);
    else arg.to.write(m, k, sum);
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) _linear4bit_small_dx_kernel(Arguments<T> arg) {
  constexpr int MT = Shape::MT, Bytes = Shape::Bytes, U = Shape::U, kLaneColumns = Shape::kLaneColumns;
  constexpr int warps_n = Shape::Warps / Shape::Groups;
  FP_DYNAMIC_SHARED(float, shared);
  float2* table = reinterpret_cast<float2*>(shared);
  float* code = shared + 2 * kCodeTable;
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;

  fill_codes(table, arg.w.quant_type, tid, Shape::kThreads);
  if (arg.w.codes && tid < 256) code[tid] = ptx::load(arg.w.code + tid);
  const float offset = arg.w.codes ? ptx::load(arg.w.offset) : 0.0f;
  __syncthreads();

  const int k =
      static_cast<int>(blockIdx.x) * Shape::kColumns + warp / warps_n * Shape::kWarpColumns + kLaneColumns * g;
  const uint32_t row_runs = static_cast<uint32_t>(arg.K / kLaneColumns);  // of kLaneColumns values
  const int to_block = arg.w.log2_block - (Bytes == 8 ? 4 : 3);
  using Run = std::remove_reference_t<decltype(Packed<Bytes>::bytes[0])>;
  const Run* runs = reinterpret_cast<const Run*>(arg.w.packed);
  const int64_t begin = blockIdx.y * arg.span, end = begin + arg.span < arg.N ? begin + arg.span : arg.N;

  constexpr int64_t apart = warps_n * kRows;  // the next step of this warp
  float acc[Bytes][MT][4] = {};
  for (int64_t first = begin + warp % warps_n * kRows; first < end; first += U * apart) {
    Packed<Bytes> packed[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * apart >= end) break;
      const int64_t n = first + u * apart + kLaneRows * t;
      const uint32_t run = static_cast<uint32_t>(n) * row_runs + static_cast<uint32_t>(k / kLaneColumns);
#pragma unroll
      for (int j = 0; j < kLaneRows; ++j) {
        packed[u].bytes[j] = {};
        packed[u].scale[j] = {};
        if (n + j >= end || k >= arg.K) continue;
        const uint32_t at = run + static_cast<uint32_t>(j) * row_runs;
        packed[u].bytes[j] = ptx::load_stream(runs + at);
        packed[u].scale[j].fetch(arg.w, at >> to_block);
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * apart >= end) break;
      const int64_t n = first + u * apart + kLaneRows * t;
      uint4 dy[MT];
#pragma unroll
      for (int i = 0; i < MT; ++i)
        dy[i] = load_row(arg.dy + min(8 * i + g, arg.M - 1) * arg.dy_stride + n, end - n, arg.wide);
      float absmax[kLaneRows];
#pragma unroll
      for (int j = 0; j < kLaneRows; ++j) absmax[j] = packed[u].scale[j].value(arg.w, code, offset);
      multiply<T, Shape>(packed[u], absmax, table + (lane & 15), dy, acc);
    }
  }

  float* of_lane = shared + warp * Shape::kSums + g * (kLaneColumns + 1);
#pragma unroll
  for (int i = 0; i < MT; ++i) {
    __syncthreads();  // the sums reuse the memory of the table
#pragma unroll
    for (int c = 0; c < Bytes; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) of_lane[(2 * t + (e & 1)) * Shape::kSumStride + 2 * c + e / 2] = acc[c][i][e];
    __syncthreads();
    write_rows<T, Shape>(arg, shared, 8 * i);
  }
}

// Calls `go` with the tile for M rows.
template <class F>
auto with_tile(int64_t M, F go) {
  if (M <= 8) return go(Tile<1, 8, 1, 1, 16>{});
  if (M <= 16) return go(Tile<2, 8, 2, 1, 8>{});
  if (M <= 32) return go(Tile<4, 4, 2, 2, 8>{});
  return go(Tile<8, 4, 1, 2, 8>{});
}

template <class T, class Shape>
cudaError_t launch(Arguments<T> arg, int64_t spans, cudaStream_t stream) {
  const auto kernel = _linear4bit_small_dx_kernel<T, Shape>;
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kShared);
  if (error != cudaSuccess) return error;
  const int64_t steps = (arg.N + kRows - 1) / kRows;
  arg.span = (steps + spans - 1) / spans * kRows;
  const dim3 grid(static_cast<unsigned>((arg.K + Shape::kColumns - 1) / Shape::kColumns), static_cast<unsigned>(spans));
  const cudaError_t done = FP_LAUNCH(kernel, grid, dim3(Shape::kThreads), size_t{Shape::kShared}, stream, arg);
  return done != cudaSuccess || spans == 1 ? done : sum_spans(arg.to, spans, stream);
}

constexpr int64_t kMaxValues = int64_t{1} << 35;  // runs of 8 are counted in 32 bits

bool serves(int64_t M, int64_t N, int64_t K) {
  return M >= 0 && M <= 64 && N > 0 && K > 0 && K <= INT32_MAX && K % 16 == 0 && N <= kMaxValues / K;
}

}  // namespace
}  // namespace fastpeft

extern "C" int64_t fp_linear4bit_small_dx_spans(int64_t M, int64_t N, int64_t K) {
  using namespace fastpeft;
  const int processors = processor_count();
  if (!serves(M, N, K) || processors == 0) return 1;
  return with_tile(M, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t columns = (K + Shape::kColumns - 1) / Shape::kColumns, steps = (N + kRows - 1) / kRows;
    // Bytes: what all processors could have read in the time of the busiest one, and the sums, written and read.
    auto cost = [&](int64_t spans) {
      const int64_t waves = (columns * spans + processors - 1) / processors, rows = (steps + spans - 1) / spans * kRows;
      return waves * processors * rows * (Shape::kColumns / 2) + (spans > 1 ? 8 * spans * M * K : 0);
    };
    return best_spans(steps, steps / (Shape::Warps / Shape::Groups), cost);  // a step for every warp
  });
}

extern "C" int fp_linear4bit_small_dx(const fp_weight4bit* w, const fp_matrix* dy, const fp_matrix* dx, int accumulate,
                                      int64_t M, int64_t N, int64_t K, float* scratch, int64_t spans, void* stream) {
  using namespace fastpeft;
  if (M == 0 || K == 0) return cudaSuccess;
  if (!serves(M, N, K) || !valid(*w) || !aligned(w->packed, 8) || dy->type != dx->type || spans < 1 ||
      spans > kMaxSpans || (spans > 1 && !scratch))
    return cudaErrorInvalidValue;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  auto go = [&](auto type) -> cudaError_t {
    using T = decltype(type);
    const bool wide = aligned(dy->data, 16) && dy->stride % 8 == 0;
    const Output<T> to{static_cast<T*>(dx->data), dx->stride, as_argument(nullptr), accumulate != 0, scratch,
                       static_cast<int>(M),       K};
    const Arguments<T> arg{as_argument(*w),
                           static_cast<const T*>(dy->data),
                           to,
                           dy->stride,
                           wide,
                           static_cast<int>(M),
                           static_cast<int>(K),
                           N,
                           0};
    return with_tile(M, [&](auto shape) { return launch<T, decltype(shape)>(arg, spans, on); });
  };
  if (dy->type == 1) return go(bf16{});
  if (dy->type == 2) return go(f16{});
  return cudaErrorInvalidValue;
}
