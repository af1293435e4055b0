// Inside the emulator: the fibres, and what the files of the runtime ask of one another. Built without sanitizers; the
// sanitizers' hooks are weak symbols, so that one object serves plain, ThreadSanitizer and AddressSanitizer builds.
#pragma once
#include <vector>

#include "cuda_emu.h"

#ifndef __x86_64__
#define EMU_UCONTEXT
#endif
#ifdef EMU_UCONTEXT
#include <ucontext.h>
#endif

#define EMU_WEAK __attribute__((weak))
extern "C" {
EMU_WEAK void* __tsan_get_current_fiber(void);
EMU_WEAK void* __tsan_create_fiber(unsigned);
EMU_WEAK void __tsan_destroy_fiber(void*);
EMU_WEAK void __tsan_switch_to_fiber(void*, unsigned);
EMU_WEAK void __tsan_set_fiber_name(void*, const char*);
EMU_WEAK void __tsan_acquire(void*);
EMU_WEAK void __tsan_release(void*);
EMU_WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
EMU_WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
EMU_WEAK void __asan_poison_memory_region(void const volatile*, size_t);
EMU_WEAK void __asan_unpoison_memory_region(void const volatile*, size_t);
}

namespace emu {

enum class State { ready, in_barrier, in_warp, done };

struct Copy {
  void* to;
  const void* from;
  int bytes, source_bytes;
};

struct Fibre : Thread {
  State state;
  char* stack;
  void* tsan;
  void* fake_stack;
  const char* file;
  int line;
  int barrier, count;  // waited for; what it counted
  uint32_t mask;
  WarpOp op;
  int argument;
  const void* in;
  void* out;
  std::vector<std::vector<Copy>>* copies;  // cp.async groups, the last one open
#ifdef EMU_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;
#endif
};

constexpr size_t kStack = 128 << 10;

struct Lane {
  const void* in;
  void* out;
  bool present;
  int argument;
};

inline Fibre* current() { return static_cast<Fibre*>(emu_current); }
inline void acquire(void* clock) {
  if (__tsan_acquire) __tsan_acquire(clock);
}
inline void release(void* clock) {
  if (__tsan_release) __tsan_release(clock);
}
inline void poison_region(void* p, size_t n) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(p, n);
}
inline void unpoison_region(void* p, size_t n) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(p, n);
}

// emu_fibre.cpp
void make_stack(Fibre& fibre);
void drop_stack(Fibre& fibre);
void fresh_stack(Fibre& fibre);  // for cross-block races: a new identity to ThreadSanitizer, and new pages
void start_at(Fibre& fibre, void (*entry)());
void switch_to(Fibre* from, Fibre* to, bool dying);

// emu_warp.cpp
void run_warp_op(WarpOp op, Lane* lanes);

// emu_memory.cpp
void begin_block_memory(size_t dynamic_bytes);
void end_block_memory(bool keep_apart);  // apart: the addresses of one block's memory are not given to the next
void end_launch_memory();

// emu_runtime.cpp
extern int launch_error;
// Ends the launch with a message.
[[noreturn]] void fail(const char* what, const char* file = "", int line = 0);

}  // namespace emu
