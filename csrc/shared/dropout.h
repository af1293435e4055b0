// The dropout mask as a pure function of (seed, row, column), shared by every C++ and CUDA kernel: the arithmetic of
// fastpeft/reference/dropout.py, where the contract is. Philox4x32-7: Salmon et al. 2011, SC '11.
#pragma once
#include <cstdint>

namespace fastpeft {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// One of kPhiloxRounds rounds; between rounds the caller adds kPhiloxW0 and kPhiloxW1 to the key.
// V: a vector of 32-bit unsigned counters; V::mul(a, m, hi, lo) gives both halves of the products.
template <class V>
inline void philox_round(V& c0, V& c1, V& c2, V& c3, uint32_t k0, uint32_t k1) {
  V hi0, lo0, hi1, lo1;
  V::mul(c0, kPhiloxM0, hi0, lo0);
  V::mul(c2, kPhiloxM1, hi1, lo1);
  c0 = hi1 ^ c1 ^ V(k0);
  c1 = lo1;
  c2 = hi0 ^ c3 ^ V(k1);
  c3 = lo0;
}

constexpr int16_t kDrawBits = 0x7fff;
constexpr uint32_t kDraws = 32768;  // that many values has a draw

// How many of them drop an element.
inline uint32_t dropout_threshold(double p) {
  // Round half to even, as Python's round(): the same threshold for the same p in every backend.
  double scaled = p * kDraws;
  double below = static_cast<double>(static_cast<int64_t>(scaled));
  double rest = scaled - below;
  int64_t rounded = static_cast<int64_t>(below) + (rest > 0.5 || (rest == 0.5 && (static_cast<int64_t>(below) & 1)));
  return static_cast<uint32_t>(rounded < kDraws - 1 ? rounded : kDraws - 1);
}

// An element is kept where its draw is more than `most`, or, with all bits of `flip`, where it is not.
struct KeepRule {
  int16_t most;
  uint32_t flip;
};

// Of a threshold that is not 0. Beyond the infinity of fp16, in which GPUs compare, the draws count from the other end.
inline KeepRule keep_rule(uint32_t threshold) {
  if (threshold <= 0x7c00) return {static_cast<int16_t>(threshold - 1), 0u};
  return {static_cast<int16_t>(kDraws - 1 - threshold), ~0u};
}

}  // namespace fastpeft
