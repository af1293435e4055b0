// The buffers that are kept between calls.
#include "host/workspace.h"

#include <pthread.h>

#include <mutex>
#include <new>
#include <vector>

namespace fastpeft {
namespace {

constexpr std::align_val_t kAlign{64};
constexpr size_t kPage = 4096;

void* allocate(size_t bytes) { return ::operator new(bytes, kAlign); }
void release(void* data) { ::operator delete(data, kAlign); }

struct Kept {
  void* data;
  size_t size;
};

// AddressSanitizer knows a buffer's bounds only if it is not part of a larger one that was kept.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kKeeps = false;
#else
constexpr bool kKeeps = true;
#endif

struct Workspace {
  std::mutex lock;
  std::vector<Kept> kept;  // the oldest first
  size_t bytes = 0;

  void forget(size_t i) {
    bytes -= kept[i].size;
    kept.erase(kept.begin() + static_cast<std::ptrdiff_t>(i));
  }
};

// Never destroyed, as threads may outlive it. Locked during a fork, so that the child never inherits a lock held by a
// thread that it does not have.
Workspace& workspace() {
  static Workspace* const all = [] {
    pthread_atfork([] { workspace().lock.lock(); }, [] { workspace().lock.unlock(); },
                   [] { workspace().lock.unlock(); });
    auto* const made = new Workspace;
    made->kept.reserve(kMaxKept / kMinKept);  // keeping a buffer then never allocates
    return made;
  }();
  return *all;
}

// The smallest buffer that fits and is at most twice as large; or null.
Kept take(size_t bytes) {
  Workspace& all = workspace();
  const std::lock_guard<std::mutex> held(all.lock);
  size_t best = all.kept.size();
  for (size_t i = 0; i < all.kept.size(); ++i) {
    const size_t size = all.kept[i].size;
    if (size >= bytes && size / 2 <= bytes && (best == all.kept.size() || size < all.kept[best].size)) best = i;
  }
  if (best == all.kept.size()) return {nullptr, 0};
  const Kept found = all.kept[best];
  all.forget(best);
  return found;
}

}  // namespace

Buffer::Buffer(size_t bytes) : data(nullptr), size(bytes) {
  if (bytes == 0) return;
  if (bytes < kMinKept || !kKeeps) {
    data = allocate(bytes);
    return;
  }
  const Kept found = take(bytes);
  size = found.data ? found.size : (bytes + kPage - 1) / kPage * kPage;
  data = found.data ? found.data : allocate(size);
}

Buffer::~Buffer() {
  if (!data) return;
  if (size < kMinKept || size > kMaxKept || !kKeeps) {
    release(data);
    return;
  }
  Workspace& all = workspace();
  const std::lock_guard<std::mutex> held(all.lock);
  while (all.bytes + size > kMaxKept) {
    release(all.kept.front().data);
    all.forget(0);
  }
  all.kept.push_back({data, size});
  all.bytes += size;
}

size_t kept_bytes() {
  Workspace& all = workspace();
  const std::lock_guard<std::mutex> held(all.lock);
  return all.bytes;
}

size_t release_kept() {
  Workspace& all = workspace();
  const std::lock_guard<std::mutex> held(all.lock);
  const size_t bytes = all.bytes;
  for (const Kept& one : all.kept) release(one.data);
  all.kept.clear();
  all.bytes = 0;
  return bytes;
}

}  // namespace fastpeft
