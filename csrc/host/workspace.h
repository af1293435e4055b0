// Memory that operators on the CPU need during a call.
//
// Large buffers are kept for the next call: a fresh page from the operating system costs about as much as decoding its
// 4 KiB, and malloc returns large blocks to the system. A buffer is raw bytes, without dtype or shape, for any thread.
#pragma once
#include <cstddef>

namespace fastpeft {

// Smaller buffers come from malloc, which keeps them itself. When more than kMaxKept would be kept, the oldest are
// freed.
constexpr size_t kMinKept = size_t{1} << 16, kMaxKept = size_t{1} << 26;

// At least `bytes`, aligned to a cache line, not initialised; null for 0.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept : data(other.data), size(other.size) { other.data = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data;
  size_t size;
};

// Bytes that are kept and not in use.
size_t kept_bytes();
// Frees them; returns how many there were.
size_t release_kept();

}  // namespace fastpeft
