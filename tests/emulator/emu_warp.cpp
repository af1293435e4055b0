// The operations of a warp, done once for all lanes by the last to arrive. No libc call: a sanitizer's interceptor
// would see one lane touch the stacks of the others.
#include "emu_runtime.h"

namespace emu {
namespace {

void copy(void* to, const void* from, int bytes) {
  volatile char* out = static_cast<volatile char*>(to);
  const volatile char* in = static_cast<const volatile char*>(from);
  while (bytes--) *out++ = *in++;
}

float element(uint32_t pair, int high, bool half) {
  if (!half) return __uint_as_float(high ? pair & 0xffff0000u : pair << 16);
  const __half_raw raw{static_cast<unsigned short>(high ? pair >> 16 : pair & 0xffff)};
  return __half2float(__half(raw));
}

// mma.m16n8k16: lane 4g + t holds of A rows g, g + 8 and of B column g, each at k = 2t, 2t + 1, 2t + 8, 2t + 9.
void mma(const Lane* lanes, bool half) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MmaOperands*>(lanes[lane].in);
    const int g = lane >> 2, k = 2 * (lane & 3);
    for (int high = 0; high < 2; ++high) {
      a[g][k + high] = element(in.a[0], high, half);
      a[g + 8][k + high] = element(in.a[1], high, half);
      a[g][k + 8 + high] = element(in.a[2], high, half);
      a[g + 8][k + 8 + high] = element(in.a[3], high, half);
      b[g][k + high] = element(in.b[0], high, half);
      b[g][k + 8 + high] = element(in.b[1], high, half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MmaOperands*>(lanes[lane].in);
    float* out = static_cast<float*>(lanes[lane].out);
    for (int i = 0; i < 4; ++i) {
      const int row = (lane >> 2) + 8 * (i >> 1), column = 2 * (lane & 3) + (i & 1);
      float sum = in.c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      out[i] = sum;
    }
  }
}

// The row pointers of the 8x8 matrix j come from lanes 8j .. 8j + 7.
void ldmatrix(const Lane* lanes) {
  const int count = lanes[0].argument & 15;
  const bool transposed = lanes[0].argument >> 4;
  for (int lane = 0; lane < 32; ++lane)
    for (int j = 0; j < count; ++j) {
      uint32_t pair = 0;
      for (int high = 0; high < 2; ++high) {
        const int along = 2 * (lane & 3) + high, across = lane >> 2;
        const int row = transposed ? along : across, column = transposed ? across : along;
        const char* data = *static_cast<const char* const*>(lanes[8 * j + row].in);
        pair |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(data)[column]) << (16 * high);
      }
      static_cast<uint32_t*>(lanes[lane].out)[j] = pair;
    }
}

void shuffle(const Lane* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!lanes[lane].present) continue;
    const int source = lanes[lane].argument & 255, bytes = lanes[lane].argument >> 8;
    if (source < 32 && lanes[source].present) copy(lanes[lane].out, lanes[source].in, bytes);
    else  // undefined on a GPU
      for (int i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(lanes[lane].out)[i] = 0xFF;
  }
}

void ballot(const Lane* lanes) {
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (lanes[lane].present && *static_cast<const int*>(lanes[lane].in)) votes |= 1u << lane;
  for (int lane = 0; lane < 32; ++lane)
    if (lanes[lane].present) *static_cast<uint32_t*>(lanes[lane].out) = votes;
}

}  // namespace

void run_warp_op(WarpOp op, Lane* lanes) {
  switch (op) {
    case WarpOp::sync: return;
    case WarpOp::shuffle: return shuffle(lanes);
    case WarpOp::ballot: return ballot(lanes);
    case WarpOp::mma_bf16: return mma(lanes, false);
    case WarpOp::mma_f16: return mma(lanes, true);
    case WarpOp::ldmatrix: return ldmatrix(lanes);
  }
}

}  // namespace emu
