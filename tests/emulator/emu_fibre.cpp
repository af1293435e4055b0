// Stacks and the switch between them, told to the sanitizers.
#include <sys/mman.h>

#include "emu_runtime.h"

namespace emu {
namespace {
constexpr size_t kGuard = 4096;

void* map_stack(void* at, size_t bytes, int flags) {
  return mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
}
}  // namespace

void make_stack(Fibre& fibre) {
  char* base = static_cast<char*>(map_stack(nullptr, kStack + kGuard, 0));
  mprotect(base, kGuard, PROT_NONE);
  fibre.stack = base + kGuard;
  fibre.tsan = __tsan_create_fiber ? __tsan_create_fiber(1) : nullptr;
}

void drop_stack(Fibre& fibre) {
  if (fibre.tsan) __tsan_destroy_fiber(fibre.tsan);
  munmap(fibre.stack - kGuard, kStack + kGuard);
}

void fresh_stack(Fibre& fibre) {
  if (!fibre.tsan) return;
  __tsan_destroy_fiber(fibre.tsan);
  munmap(fibre.stack, kStack);
  map_stack(fibre.stack, kStack, MAP_FIXED);
  fibre.tsan = __tsan_create_fiber(1);
}

#ifdef EMU_UCONTEXT
void start_at(Fibre& fibre, void (*entry)()) {
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack;
  fibre.context.uc_stack.ss_size = kStack;
  makecontext(&fibre.context, entry, 0);
}
#else
// Saves the callee's registers of the System V ABI, 22 ns: swapcontext makes two system calls and takes 8 times as
// long.
extern "C" void emu_switch(void** from, void* to);
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void start_at(Fibre& fibre, void (*entry)()) {
  void** top = reinterpret_cast<void**>(fibre.stack + kStack);
  *--top = nullptr;  // entry's return address, which keeps its stack aligned
  *--top = reinterpret_cast<void*>(entry);
  fibre.stack_pointer = top - 6;
}
#endif

void switch_to(Fibre* from, Fibre* to, bool dying) {
  if (from == to) return;
  emu_current = to;
  // 1: no happens-before by the switch itself; only barriers and atomics order two CUDA threads.
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to->tsan, 1);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(dying ? nullptr : &from->fake_stack, to->stack, to->stack ? kStack : 8 << 20);
#ifdef EMU_UCONTEXT
  swapcontext(&from->context, &to->context);
#else
  emu_switch(&from->stack_pointer, to->stack_pointer);
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
}

}  // namespace emu
