// The launchers of the CUDA kernels: C calls on plain pointers, free of torch, so that tests reach them through ctypes.
//
// They return a cudaError_t: cudaErrorInvalidValue (1) if a launcher does not serve its arguments; then nothing was
// launched. `stream` is a cudaStream_t.
#pragma once
#include <cstdint>

extern "C" {

// A quantised weight of n values (fourbit.h). Plain: absmax fp32 [blocks], codes null. Doubly quantised: codes uint8
// [blocks], code fp32 [256], scale fp32 [blocks / 256, rounded up], offset one fp32; absmax null.
struct fp_weight4bit {
  const void* packed;
  const float* absmax;
  const uint8_t* codes;
  const float* code;
  const float* scale;
  const float* offset;
  int32_t quant_type;  // fastpeft::FourBit
  int32_t block_size;  // a power of two, 32 to 4096
};

// A matrix with a contiguous last dimension; `type` is 0 fp32, 1 bf16, 2 fp16 (fastpeft::Type).
struct fp_matrix {
  void* data;
  int64_t stride;  // between rows, in elements
  int32_t type;
};

// out [N, K] = the weight, to the bit of bitsandbytes. out.stride >= K: a workspace may keep columns for an adapter.
int fp_dequantize_4bit(const fp_weight4bit* w, const fp_matrix* out, int64_t N, int64_t K, void* stream);

// y [M, N] = x [M, K] Wᵀ + scale · s [M, R] bᵀ + bias, added to what y holds where `accumulate`.
// x, y the same 16-bit type; s, b, bias any of the three. s.data null: no adapter; bias null: none.
// Serves 1 <= M <= 64, K % 32 = 0, N K <= 2^35, x aligned to 16 bytes, packed to 8, x.stride a multiple of 8 and at
// most 2^24.
int fp_linear4bit_small(const fp_weight4bit* w, const fp_matrix* x, const fp_matrix* y, const fp_matrix* s,
                        const fp_matrix* b, const fp_matrix* bias, float scale, int accumulate, int64_t M, int64_t N,
                        int64_t K, int64_t R, void* stream);

// dx [M, K] = dy [M, N] W, added to what dx holds where `accumulate`. dy, dx the same 16-bit type, dy of any alignment.
// Serves 1 <= M <= 64, N >= 1, K % 16 = 0, N K <= 2^35, packed aligned to 8 bytes. N is summed in `spans`, of which
// fp_linear4bit_small_dx_spans names the number for the current device; scratch: fp32 [spans, M, K], unused for one.
int fp_linear4bit_small_dx(const fp_weight4bit* w, const fp_matrix* dy, const fp_matrix* dx, int accumulate, int64_t M,
                           int64_t N, int64_t K, float* scratch, int64_t spans, void* stream);
int64_t fp_linear4bit_small_dx_spans(int64_t M, int64_t N, int64_t K);

// As fp_linear4bit_small, for up to 512 rows: K % 64 = 0, N K <= 2^36, block_size >= 64, x and packed aligned to 16
// bytes, x.stride a multiple of 8. K is summed in `spans`, fp_linear4bit_mid_spans for the current device; scratch:
// fp32 [spans, M, N], unused for one.
int fp_linear4bit_mid(const fp_weight4bit* w, const fp_matrix* x, const fp_matrix* y, const fp_matrix* s,
                      const fp_matrix* b, const fp_matrix* bias, float scale, int accumulate, int64_t M, int64_t N,
                      int64_t K, int64_t R, float* scratch, int64_t spans, void* stream);
int64_t fp_linear4bit_mid_spans(int64_t M, int64_t N, int64_t K);
}
