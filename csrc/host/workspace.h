// Memory that operators on the CPU need for the length of a call.
//
// Large buffers are kept for the next call: the operating system takes about as long to hand out a fresh page as its 4 KiB
// take to be decoded, and malloc gives back to it what is large. They are bytes, of no dtype and no shape, for whichever thread asks.
#pragma once
#include <cstddef>

namespace fastpeft {

// Smaller ones are malloc's, which keeps those itself; beyond the most that is kept, the oldest are let go.
constexpr size_t kLeastKept = size_t{1} << 16, kMostKept = size_t{1} << 26;

// `bytes` at least, aligned to a cache line, not initialised; null for 0.
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

// What is kept and not in use, in bytes.
size_t kept_bytes();
// Lets go of it; returns how much that was.
size_t release_kept();

}  // namespace fastpeft
