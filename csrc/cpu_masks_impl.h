// The keep masks of dropout as bits, drawn and applied by vectors of one instruction set; included by cpu_kernels_impl.h.
#pragma once
#include "cpu_kernels.h"
#include "dropout.h"
#include "simd.h"

namespace {

using namespace fastpeft;

// No template of the standard library in here: an instance compiled for this instruction set could be the one that the
// linker keeps for the whole library.
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Two vectors of counters at a time: one chain of seven rounds alone waits on the latency of its products.
constexpr int kChains = 2;

// The bits of 16-bit samples, each the high half of a lane, that are `threshold` at least.
inline void put_bits(uint8_t* out, int64_t column, vu samples, uint32_t threshold) {
#if FP_ISA >= 2
  const __mmask16 bits = _mm512_cmpge_epu32_mask(reinterpret_cast<__m512i>(samples), _mm512_set1_epi32(static_cast<int>(threshold << 16)));
  std::memcpy(out + column / 8, &bits, 2);
#else
  const vi kept = reinterpret_cast<vi>(samples >> 16) > vi{} + (static_cast<int32_t>(threshold) - 1);
#if FP_ISA == 1
  out[column / 8] = static_cast<uint8_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(kept)));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (static_cast<unsigned>(kept[i]) & 1u) << i;
  const int shift = static_cast<int>(column % 8);
  out[column / 8] = static_cast<uint8_t>((shift ? out[column / 8] : 0) | bits << shift);
#endif
#endif
}

inline vu get_bits(const uint8_t* bits, int64_t column) {
#if FP_ISA >= 2
  __mmask16 m;
  std::memcpy(&m, bits + column / 8, 2);
  return reinterpret_cast<vu>(_mm512_movm_epi32(m));
#else
  vu select;
  for (int i = 0; i < kLanes; ++i) select[i] = 1u << i;
  const vu byte = vu{} + static_cast<uint32_t>(bits[column / 8] >> column % 8);
  return reinterpret_cast<vu>((byte & select) == select);
#endif
}

void draw(Dropout drop, int64_t m0, int64_t m1, int64_t width, uint8_t* bits, int64_t ld) {
  const uint32_t k0 = static_cast<uint32_t>(drop.seed), k1 = static_cast<uint32_t>(drop.seed >> 32);
  vu lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
  for (int64_t m = m0; m < m1; ++m, bits += ld) {
    const uint64_t row = static_cast<uint64_t>(m);
    for (int64_t group = 0; group * kCols < width; ++group) {
      const int64_t n = smaller(kCols, width - group * kCols);
      uint8_t* out = bits + group * (kCols / 8);
      for (int64_t c = 0; c < smaller(32, n); c += kChains * kLanes) {
        Counter w[kChains][4];
        for (int i = 0; i < kChains; ++i) {
          w[i][0] = Counter(lane + static_cast<uint32_t>(group * 32 + c + i * kLanes));
          w[i][1] = Counter(static_cast<uint32_t>(row));
          w[i][2] = Counter(static_cast<uint32_t>(row >> 32));
          w[i][3] = Counter(0u);
        }
        uint32_t r0 = k0, r1 = k1;
        for (int round = 0; round < kPhiloxRounds; ++round, r0 += kPhiloxW0, r1 += kPhiloxW1)
          for (int i = 0; i < kChains; ++i) philox_round(w[i][0], w[i][1], w[i][2], w[i][3], r0, r1);
        for (int i = 0; i < kChains; ++i)
          for (int j = 0; j < 4; ++j) {
            const int64_t column = j * 64 + c + i * kLanes;
            const vu two = w[i][j].value();
            put_bits(out, column, two << 16, drop.threshold);
            put_bits(out, column + 32, two, drop.threshold);
          }
      }
    }
  }
}

inline vf masked(vf x, vu mask) { return reinterpret_cast<vf>(reinterpret_cast<vu>(x) & mask); }

}  // namespace
