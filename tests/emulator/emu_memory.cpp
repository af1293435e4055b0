// Shared memory full of NaN, cp.async that copies only when it is waited for, and the count of bytes moved.
#include <cstdlib>
#include <unordered_set>

#include "emu_runtime.h"

namespace emu {
namespace {

constexpr size_t kArena = 256 << 10, kAlign = 1024, kRedZone = 32;
constexpr int kSlots = 64;

struct Slot {
  const void* key;
  char* data;
};
char* arena;
size_t arena_top = kArena;
Slot slots[kSlots];
int slot_count;
char* dynamic;
size_t dynamic_size;
std::vector<void*>* set_aside;

bool counting;
int64_t moved;
std::unordered_set<uintptr_t>* sectors;

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// A loop and not memset, whose interceptor would make this a write that races with the kernel's.
__attribute__((noinline)) void fill_nan(void* p, size_t n) {
  volatile unsigned char* bytes = static_cast<volatile unsigned char*>(p);
  for (size_t i = 0; i < n; ++i) bytes[i] = 0xFF;
}

void drop(void* p, bool keep_apart) {
  if (!keep_apart) return free(p);
  if (!set_aside) set_aside = new std::vector<void*>;
  set_aside->push_back(p);
}

}  // namespace

void begin_block_memory(size_t dynamic_bytes) {
  if (!arena) arena = static_cast<char*>(aligned_alloc(kAlign, kArena));
  unpoison_region(arena, kArena);
  fill_nan(arena, arena_top);
  poison_region(arena, kArena);
  arena_top = 0;
  slot_count = 0;
  dynamic_size = dynamic_bytes;
  if (!dynamic_bytes) return;
  const size_t room = round_up(dynamic_bytes, kAlign);
  dynamic = static_cast<char*>(aligned_alloc(kAlign, room));
  fill_nan(dynamic, dynamic_bytes);
  poison_region(dynamic + dynamic_bytes, room - dynamic_bytes);
}

void end_block_memory(bool keep_apart) {
  if (dynamic) {
    unpoison_region(dynamic, round_up(dynamic_size, kAlign));
    drop(dynamic, keep_apart);
  }
  dynamic = nullptr;
  if (!keep_apart) return;
  unpoison_region(arena, kArena);
  drop(arena, true);
  arena = nullptr;
  arena_top = kArena;
}

void end_launch_memory() {
  if (set_aside)
    for (void* p : *set_aside) free(p);
  delete set_aside;
  set_aside = nullptr;
}

extern "C" {

void* emu_dynamic_shared() { return dynamic; }

void* emu_static_shared(const void* key, size_t bytes, size_t align) {
  for (int i = 0; i < slot_count; ++i)
    if (slots[i].key == key) return slots[i].data;
  const size_t start = round_up(arena_top + kRedZone, align < 16 ? 16 : align);
  if (start + bytes > kArena || slot_count == kSlots) fail("static shared memory is too large");
  arena_top = start + bytes;
  slots[slot_count++] = {key, arena + start};
  unpoison_region(arena + start, bytes);
  return arena + start;
}

unsigned emu_shared_address(const void* p) {
  const size_t offset = static_cast<size_t>(static_cast<const char*>(p) - dynamic);
  if (!dynamic || offset >= dynamic_size) fail("the address is not in dynamic shared memory");
  return static_cast<unsigned>(offset);
}

void emu_check_aligned(const void* p, size_t align, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) & (align - 1)) fail("misaligned address", what);
}

void emu_cp_async(void* to, const void* from, int bytes, int source_bytes) {
  Fibre* me = current();
  if (!me->copies) me->copies = new std::vector<std::vector<Copy>>(1);
  me->copies->back().push_back({to, from, bytes, source_bytes});
}

void emu_cp_commit() {
  Fibre* me = current();
  if (!me->copies) me->copies = new std::vector<std::vector<Copy>>(1);
  me->copies->emplace_back();
}

void emu_cp_wait(int pending) {
  Fibre* me = current();
  if (!me->copies) return;
  auto& groups = *me->copies;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) {
      memcpy(copy.to, copy.from, static_cast<size_t>(copy.source_bytes));
      memset(static_cast<char*>(copy.to) + copy.source_bytes, 0, static_cast<size_t>(copy.bytes - copy.source_bytes));
    }
    groups.erase(groups.begin());
  }
}

void emu_count(const void* p, size_t bytes, int kind) {
  if (!counting) return;
  if (kind != EMU_CACHED) {
    moved += static_cast<int64_t>(bytes);
    return;
  }
  const uintptr_t first = reinterpret_cast<uintptr_t>(p) / 32, last = (reinterpret_cast<uintptr_t>(p) + bytes - 1) / 32;
  for (uintptr_t sector = first; sector <= last; ++sector) moved += sectors->insert(sector).second ? 32 : 0;
}

void emu_start_counting() {
  counting = true;
  moved = 0;
  if (!sectors) sectors = new std::unordered_set<uintptr_t>;
  sectors->clear();
}

int64_t emu_stop_counting() {
  counting = false;
  return moved;
}
}

}  // namespace emu
