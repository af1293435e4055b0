// y [M, N] = x Wᵀ + scale · s bᵀ + bias for 1 <= M <= 64, straight from the bytes of a 4-bit weight.
//
// Memory-bound: N K / 2 bytes of packed and N K / block_size codes are read once, x from a cache; 2 M N K FLOP. No
// weight is ever stored: not in memory, not in shared memory.
//
// The weight is the A operand of mma.m16n8k16: 16 rows of W, 8 rows of x. The sum over k may run in any order, so lane
// 4g + t takes the 8 bytes k = 16t .. 16t + 15 of rows g and g + 8 as they lie, which are its fragments of four
// products, and the same 16 elements of x. Where blocks or K are no multiple of 64, it takes half of this: k = 8t .. 8t
// + 7. A byte becomes a pair of weights by one look-up in a table of 256 pairs that every lane has a copy of, in a bank
// of its own (32 KiB): 5 instructions a weight are all that 3 TB/s leave an H100, and a look-up or shuffle for every
// weight would take most of them. absmax multiplies the sum over 64 or 32 values of k, which lie in one block, in fp32:
// the weight is rounded once, as code, where dequantising rounds code · absmax. The warps of a thread block share rows
// and split K; their sums are added in the order of the warps, so the bytes of y do not change from call to call. The
// tiles at the end are those that no architecture spills; none is timed yet.
#include "cuda/linear4bit_device.cuh"

namespace fastpeft {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPairTable = 256 * 32;
constexpr int kTileRows = 16;              // rows of W in one mma
constexpr int kSumStride = kTileRows + 4;  // lanes 4g + t write at 2t kSumStride + g: 32 different banks

// MT tiles of 8 rows of x; a warp takes NT tiles of 16 rows of W, Chunk values of k at a time, and loads U chunks
// before it uses the first.
template <int MT_, int NT_, int U_, int Blocks_, int Chunk_>
struct Tile {
  static constexpr int MT = MT_, NT = NT_, U = U_, Chunk = Chunk_;
  static_assert(Chunk == 64 || Chunk == 32, "two words of a row for each lane, or one");
  static constexpr int Blocks = Blocks_;             // of 256 threads on a multiprocessor, which bounds the registers
  static constexpr int kSums = 8 * MT * kSumStride;  // fp32 values of a warp
  static constexpr size_t kShared = (kPairTable + 256 + kWarps * kSums) * 4;
};

template <class T>
struct Arguments {
  Weight4bit w;
  const T* x;
  T* y;
  int64_t x_stride, y_stride;
  Adapter adapter;
  AnyMatrix bias;
  bool accumulate;
  int M, chunks;     // K = Chunk chunks
  int64_t N, tiles;  // of the rows that a thread block takes at a time
  int warps_n;       // how many of its warps differ in rows; the others split K
};

// What a warp loads of W ahead of its use: rows g and g + 8 of every tile.
template <int NT, int Chunk>
struct Packed {
  std::conditional_t<Chunk == 64, uint2, uint32_t> bytes[NT][2];
  BlockScale scale[NT][2];

  // The four bytes from 4 i on.
  __device__ __forceinline__ uint32_t word(int j, int h, int i) const {
    if constexpr (Chunk == 64) return i ? bytes[j][h].y : bytes[j][h].x;
    else return bytes[j][h];
  }
};

template <class T, int MT, int NT, int Chunk>
__device__ __forceinline__ void multiply(const Arguments<T>& arg, const Packed<NT, Chunk>& packed, const uint32_t* lut,
                                         const float* code, float offset, const uint32_t (&x)[MT], int chunk,
                                         float (&acc)[NT][MT][4]) {
  constexpr int Q = Chunk / 16;  // products of 16 values of k
  uint32_t a[NT][Q][4];
  float absmax[NT][2];
#pragma unroll
  for (int j = 0; j < NT; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) absmax[j][h] = packed.scale[j][h].value(arg.w, code, offset);
#pragma unroll
    for (int q = 0; q < Q; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        a[j][q][e] = lut[(packed.word(j, e & 1, q / 2) >> (16 * (q & 1) + 4 * (e & 2)) & 0xff) * 32];
  }
#pragma unroll
  for (int i = 0; i < MT; ++i) {
    const uint4* from = reinterpret_cast<const uint4*>(arg.x + x[i] + chunk * Chunk);
    uint4 part[Q / 2];
#pragma unroll
    for (int q = 0; q < Q / 2; ++q) part[q] = ptx::load(from + q);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int q = 0; q < Q; ++q)
        ptx::mma_m16n8k16<T>(c, a[j][q][0], a[j][q][1], a[j][q][2], a[j][q][3], q & 1 ? part[q / 2].z : part[q / 2].x,
                             q & 1 ? part[q / 2].w : part[q / 2].y);
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[j][i][e] = __fmaf_rn(absmax[j][e / 2], c[e], acc[j][i][e]);
    }
  }
}

// acc += scale · s bᵀ for 16 of the R columns, of which this lane takes the four from `first` on: rows row[j] of b,
// rows 8i + g of s, of which those from M on repeat the last.
template <class T, int MT, int NT>
__device__ __forceinline__ void add_adapter(const Adapter& adapter, const int (&row)[NT][2], int M, int first, int g,
                                            float (&acc)[NT][MT][4]) {
  auto pair = [&](const AnyMatrix& m, int64_t at, int r) {
    return pair_of<T>(r < adapter.R ? m.at(at, r) : 0.0f, r + 1 < adapter.R ? m.at(at, r + 1) : 0.0f);
  };
  uint32_t b[NT][4];
#pragma unroll
  for (int j = 0; j < NT; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) b[j][e] = pair(adapter.b, row[j][e & 1], first + (e & 2));
#pragma unroll
  for (int i = 0; i < MT; ++i) {
    const int64_t m = min(8 * i + g, M - 1);
    const uint32_t s0 = pair(adapter.s, m, first), s1 = pair(adapter.s, m, first + 2);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      ptx::mma_m16n8k16<T>(c, b[j][0], b[j][1], b[j][2], b[j][3], s0, s1);
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[j][i][e] = __fmaf_rn(adapter.scale, c[e], acc[j][i][e]);
    }
  }
}

// Adds the warps' sums of a tile of rows, 16 rows for every one of the warps_n groups, and writes y.
template <class T, class Shape>
__device__ __forceinline__ void write_rows(const Arguments<T>& arg, const float* sums, int64_t first_row, int apart) {
  const int warps_k = kWarps / arg.warps_n;
  const int per_group = kTileRows * 8 * Shape::MT;
  for (int e = static_cast<int>(threadIdx.x); e < arg.warps_n * per_group; e += kThreads) {
    const int group = e / per_group, m = e % per_group / kTileRows, r = e % kTileRows;
    const int64_t n = first_row + static_cast<int64_t>(group) * apart + r;
    if (m >= arg.M || n >= arg.N) continue;
    const float* from = sums + group * warps_k * Shape::kSums + m * kSumStride + r;
    float sum = 0.0f;
    for (int warp = 0; warp < warps_k; ++warp) sum += from[warp * Shape::kSums];
    if (arg.bias.data) sum += arg.bias.at(0, n);
    T* to = arg.y + m * arg.y_stride + n;
    if (arg.accumulate) sum += to_f32(*to);
    ptx::store(to, from_f32<T>(sum));
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, Shape::Blocks) _linear4bit_small_kernel(Arguments<T> arg) {
  constexpr int MT = Shape::MT, NT = Shape::NT, U = Shape::U, Chunk = Shape::Chunk, kRun = Chunk / 4;
  FP_DYNAMIC_SHARED(uint32_t, shared);
  float* code = reinterpret_cast<float*>(shared + kPairTable);
  float* sums = code + 256;
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int warps_k = kWarps / arg.warps_n, warp_n = warp / warps_k, warp_k = warp % warps_k;

  for (int i = tid; i < kPairTable; i += kThreads)
    shared[i] = pair_of<T>(kCodes[arg.w.quant_type][i >> 9], kCodes[arg.w.quant_type][i >> 5 & 15]);
  if (arg.w.codes) code[tid] = ptx::load(arg.w.code + tid);
  const float offset = arg.w.codes ? ptx::load(arg.w.offset) : 0.0f;
  __syncthreads();

  using Word = std::conditional_t<Chunk == 64, uint2, uint32_t>;
  const Word* words = reinterpret_cast<const Word*>(arg.w.packed);
  const int to_block = arg.w.log2_block - (Chunk == 64 ? 4 : 3);
  // Rows past the end repeat the last one: their products are in columns and rows of c that no one writes out.
  uint32_t x[MT];
#pragma unroll
  for (int i = 0; i < MT; ++i)
    x[i] = static_cast<uint32_t>(min(8 * i + g, arg.M - 1)) * static_cast<uint32_t>(arg.x_stride) + kRun * t;

  for (int64_t tile = blockIdx.x; tile < arg.tiles; tile += gridDim.x) {
    const int64_t tile_row = tile * arg.warps_n * NT * kTileRows;
    int row[NT][2];
    uint32_t runs[NT][2];  // of kRun values before the row
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t n = tile_row + (warp_n * NT + j) * kTileRows + g + 8 * h;
        row[j][h] = static_cast<int>(n < arg.N ? n : arg.N - 1);
        runs[j][h] = static_cast<uint32_t>(row[j][h]) * static_cast<uint32_t>(arg.chunks) * 4;
      }
    float acc[NT][MT][4] = {};
    for (int first = warp_k; first < arg.chunks; first += warps_k * U) {
      Packed<NT, Chunk> packed[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int chunk = first + u * warps_k;
        if (chunk >= arg.chunks) break;
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t run = runs[j][h] + static_cast<uint32_t>(chunk) * 4;
            packed[u].bytes[j][h] = ptx::load_stream(words + (run + t));
            packed[u].scale[j][h].fetch(arg.w, run >> to_block);
          }
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int chunk = first + u * warps_k;
        if (chunk >= arg.chunks) break;
        multiply<T, MT, NT, Chunk>(arg, packed[u], shared + lane, code, offset, x, chunk, acc);
      }
    }
    for (int r = 16 * warp_k; r < arg.adapter.R; r += 16 * warps_k)
      add_adapter<T, MT, NT>(arg.adapter, row, arg.M, r + 4 * t, g, acc);

#pragma unroll
    for (int j = 0; j < NT; ++j) {
      float* of_warp = sums + warp * Shape::kSums;
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) of_warp[(8 * i + 2 * t + (e & 1)) * kSumStride + g + 8 * (e / 2)] = acc[j][i][e];
      __syncthreads();
      write_rows<T, Shape>(arg, sums, tile_row + j * kTileRows, NT * kTileRows);
      __syncthreads();
    }
  }
}

template <class T, class Shape>
cudaError_t launch(Arguments<T> arg, cudaStream_t stream) {
  static_assert(Shape::kShared <= 99 * 1024, "what sm_86, sm_89 and sm_120 give a thread block");
  const int processors = processor_count();
  if (processors == 0) return cudaErrorInvalidDevice;
  const auto kernel = _linear4bit_small_kernel<T, Shape>;
  if (Shape::kShared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(Shape::kShared));
    if (error != cudaSuccess) return error;
  }
  // More rows a thread block read x less often; where x is small that is worth nothing, and no processor may go idle.
  auto tiles = [&](int warps_n) {
    const int64_t rows = int64_t{kTileRows} * Shape::NT * warps_n;
    return (arg.N + rows - 1) / rows;
  };
  arg.warps_n = 1;
  while (Shape::MT > 1 && arg.warps_n < kWarps && tiles(2 * arg.warps_n) >= processors) arg.warps_n *= 2;
  arg.tiles = tiles(arg.warps_n);
  const int64_t slots = int64_t{processors} * Shape::Blocks;
  const int64_t waves = (arg.tiles + slots - 1) / slots;  // the same number for every thread block, or one less
  return FP_LAUNCH(kernel, static_cast<unsigned>((arg.tiles + waves - 1) / waves), kThreads, Shape::kShared, stream,
                   arg);
}

template <class T>
cudaError_t launch_any(Arguments<T> arg, int64_t K, cudaStream_t stream) {
  const bool whole = K % 64 == 0 && arg.w.log2_block >= 6;
  arg.chunks = static_cast<int>(K / (whole ? 64 : 32));
  if (!whole) {
    if (arg.M <= 8) return launch<T, Tile<1, 1, 8, 2, 32>>(arg, stream);
    if (arg.M <= 16) return launch<T, Tile<2, 1, 8, 2, 32>>(arg, stream);
    if (arg.M <= 32) return launch<T, Tile<4, 1, 4, 2, 32>>(arg, stream);
    return launch<T, Tile<8, 1, 8, 1, 32>>(arg, stream);
  }
  if (arg.M <= 8) return launch<T, Tile<1, 1, 4, 3, 64>>(arg, stream);
  if (arg.M <= 16) return launch<T, Tile<2, 2, 2, 2, 64>>(arg, stream);
  if (arg.M <= 32) return launch<T, Tile<4, 1, 2, 2, 64>>(arg, stream);
  return launch<T, Tile<8, 1, 4, 1, 64>>(arg, stream);
}

constexpr int64_t kMaxValues = int64_t{1} << 35;  // runs of 8 are counted in 32 bits

}  // namespace
}  // namespace fastpeft

extern "C" int fp_linear4bit_small(const fp_weight4bit* w, const fp_matrix* x, const fp_matrix* y, const fp_matrix* s,
                                   const fp_matrix* b, const fp_matrix* bias, float scale, int accumulate, int64_t M,
                                   int64_t N, int64_t K, int64_t R, void* stream) {
  using namespace fastpeft;
  if (M == 0 || N == 0) return cudaSuccess;
  const bool sizes = M >= 0 && M <= 64 && N >= 0 && K > 0 && K % 32 == 0 && N <= kMaxValues / K && R >= 0 &&
                     R <= INT32_MAX && x->stride <= 1 << 24;
  if (!sizes || !valid(*w) || !aligned(w->packed, 8) || !aligned(x->data, 16) || x->stride % 8 || x->type != y->type)
    return cudaErrorInvalidValue;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  auto go = [&](auto type) -> cudaError_t {
    using T = decltype(type);
    const bool given = s && s->data && b && b->data;
    const Adapter adapter{as_argument(s), as_argument(b), scale, given ? static_cast<int>(R) : 0};
    return launch_any<T>({as_argument(*w), static_cast<const T*>(x->data), static_cast<T*>(y->data), x->stride,
                          y->stride, adapter, as_argument(bias), accumulate != 0, static_cast<int>(M), 0, N, 0, 1},
                         K, on);
  };
  if (x->type == 1) return go(bf16{});
  if (x->type == 2) return go(f16{});
  return cudaErrorInvalidValue;
}
