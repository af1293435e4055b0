// The scheduler: barriers, warp collectives, the order of threads, and errors that name who waits where.
#include "emu_runtime.h"
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>

namespace emu {
extern "C" {
Thread* emu_current;
}
int launch_error;

namespace {

struct Barrier {
  int arrived, counted;
  const char* file;
  int line, phase;
  char clocks[2];  // their addresses are what ThreadSanitizer knows a phase by
};
enum class Order { forward, reverse, random };

std::vector<Fibre> fibres;
std::vector<int> ready;
size_t ready_head;
int live, threads;
Barrier barriers[16];
Fibre host;
const std::function<void()>* kernel;
std::vector<char> warp_clocks;
char begin_clock, end_clock;
Order order;
bool apart, failed;
std::mt19937_64 random_bits;
std::string message;

Fibre* next() {
  if (ready_head >= ready.size()) {
    ready.clear();
    ready_head = 0;
    if (!live) return &host;
    fail("deadlock: no thread can run");
  }
  if (order == Order::random) {
    const size_t pick = ready_head + random_bits() % (ready.size() - ready_head);
    std::swap(ready[pick], ready[ready_head]);
  }
  return &fibres[static_cast<size_t>(ready[ready_head++])];
}

void wake(Fibre& fibre) {
  fibre.state = State::ready;
  if (ready_head > 65536) {
    for (size_t i = ready_head; i < ready.size(); ++i) ready[i - ready_head] = ready[i];
    ready.resize(ready.size() - ready_head);
    ready_head = 0;
  }
  ready.push_back(fibre.index);
}

template <class F>
void in_order(int count, F f) {
  if (order == Order::reverse)
    for (int i = count; i--;) f(i);
  else
    for (int i = 0; i < count; ++i) f(i);
}

void complete(Barrier& barrier, int id) {
  const int counted = barrier.counted;
  barrier.arrived = barrier.counted = 0;
  barrier.file = nullptr;
  barrier.phase ^= 1;
  in_order(threads, [&](int i) {
    Fibre& fibre = fibres[static_cast<size_t>(i)];
    if (fibre.state != State::in_barrier || fibre.barrier != id) return;
    fibre.count = counted;
    wake(fibre);
  });
}

void check_same(const Fibre& one, const Fibre& other) {
  if (one.mask != other.mask || one.op != other.op || (one.op != WarpOp::shuffle && one.argument != other.argument))
    fail("the lanes of a warp meet in different operations or masks", one.file, one.line);
  if (one.line != other.line || one.file != other.file)
    fail("the lanes of a warp meet at different lines", one.file, one.line);
}

// Does every operation of the warp that all its live lanes have reached.
void try_warp(int warp) {
  Fibre* base = &fibres[static_cast<size_t>(warp) * 32];
  const int count = std::min(32, threads - warp * 32);
  uint32_t waiting = 0, alive = 0;
  for (int i = 0; i < count; ++i) {
    if (base[i].state != State::done) alive |= 1u << i;
    if (base[i].state == State::in_warp) waiting |= 1u << i;
  }
  for (int i = 0; i < count; ++i) {
    if (!(waiting >> i & 1)) continue;
    const Fibre& fibre = base[i];
    const uint32_t needed = fibre.mask & alive;
    if ((waiting & needed) != needed) continue;
    Lane lanes[32] = {};
    for (int j = 0; j < count; ++j) {
      if (!(needed >> j & 1)) continue;
      check_same(base[j], fibre);
      lanes[j] = {base[j].in, base[j].out, true, base[j].argument};
    }
    if (fibre.op > WarpOp::ballot && needed != ~0u) fail("mma and ldmatrix need all 32 lanes", fibre.file, fibre.line);
    run_warp_op(fibre.op, lanes);
    waiting &= ~needed;
    in_order(count, [&](int j) {
      if (needed >> j & 1) wake(base[j]);
    });
  }
}

void run_thread() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  acquire(&begin_clock);
  (*kernel)();
  Fibre* me = current();
  delete me->copies;
  me->copies = nullptr;
  me->state = State::done;
  --live;
  release(&end_clock);
  Barrier& barrier = barriers[0];
  if (barrier.arrived && barrier.arrived >= live) complete(barrier, 0);
  try_warp(me->warp);
  switch_to(me, next(), true);
  abort();
}

void make_fibres(int count) {
  if (static_cast<int>(fibres.size()) == count) return;
  for (Fibre& fibre : fibres) drop_stack(fibre);
  fibres.clear();
  fibres.resize(static_cast<size_t>(count));
  for (Fibre& fibre : fibres) make_stack(fibre);
  ready.reserve(1 << 20);
}

void run_block(dim3 grid, dim3 block, uint3 at) {
  memset(barriers, 0, sizeof barriers);
  live = threads;
  ready.clear();
  ready_head = 0;
  for (int i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[static_cast<size_t>(i)];
    const unsigned index = static_cast<unsigned>(i);
    fibre.thread_index = make_uint3(index % block.x, index / block.x % block.y, index / (block.x * block.y));
    fibre.block_index = at;
    fibre.block_size = block;
    fibre.grid_size = grid;
    fibre.index = i;
    fibre.lane = i & 31;
    fibre.warp = i >> 5;
    fibre.state = State::ready;
    fibre.copies = nullptr;
    fibre.fake_stack = nullptr;
    if (apart) fresh_stack(fibre);
    if (__tsan_set_fiber_name) {
      char name[80];
      snprintf(name, sizeof name, "cuda block %u,%u,%u thread %d (warp %d lane %d)", at.x, at.y, at.z, i, i >> 5,
               i & 31);
      __tsan_set_fiber_name(fibre.tsan, name);
    }
    unpoison_region(fibre.stack, kStack);
    start_at(fibre, run_thread);
  }
  in_order(threads, [](int i) { ready.push_back(i); });
  switch_to(&host, next(), false);
}

void read_environment() {
  static bool done;
  if (done) return;
  done = true;
  const char* wanted = getenv("EMU_SCHEDULE");
  if (wanted && *wanted >= '0' && *wanted <= '9') {
    order = Order::random;
    random_bits.seed(strtoull(wanted, nullptr, 10));
  } else if (wanted && wanted[0] == 'r') {
    order = Order::reverse;
  }
  apart = getenv("EMU_APART") != nullptr;
}

}  // namespace

void fail(const char* what, const char* file, int line) {
  const char* where[] = {"runnable", "in a barrier", "in a warp operation", "exited"};
  std::map<std::string, int> table;
  for (const Fibre& fibre : fibres) {
    const bool waits = fibre.state == State::in_barrier || fibre.state == State::in_warp;
    std::string key = where[static_cast<int>(fibre.state)];
    if (waits) key += std::string(" at ") + fibre.file + ":" + std::to_string(fibre.line);
    ++table[key];
  }
  const Fibre& me = *current();
  message = std::string(what) + " (" + file + (line ? ":" + std::to_string(line) : "") + ") in block " +
            std::to_string(me.block_index.x) + "," + std::to_string(me.block_index.y) + ", warp " +
            std::to_string(me.warp) + ", lane " + std::to_string(me.lane);
  for (const auto& [key, count] : table) message += "\n  " + std::to_string(count) + " threads " + key;
  fprintf(stderr, "CUDA emulator: %s\n", message.c_str());
  failed = true;
  switch_to(current(), &host, true);  // the block's other stacks are left as they are
  abort();
}

extern "C" {

int emu_barrier(int id, int count, bool arrive_only, int predicate, const char* file, int line) {
  Fibre* me = current();
  Barrier& barrier = barriers[id];
  me->file = file;
  me->line = line;
  if (id == 0) {
    if (barrier.arrived && (barrier.file != file || barrier.line != line)) {
      me->state = State::in_barrier;
      fail("the threads of a block meet __syncthreads at different lines", file, line);
    }
    barrier.file = file;
    barrier.line = line;
  }
  if (count % 32) fail("the count of a named barrier is not a multiple of 32", file, line);
  const int phase = barrier.phase, needed = count ? count : live;
  release(&barrier.clocks[phase]);
  ++barrier.arrived;
  barrier.counted += predicate;
  if (!arrive_only) {
    me->state = State::in_barrier;
    me->barrier = id;
  }
  if (barrier.arrived >= needed) complete(barrier, id);
  if (arrive_only) return 0;
  switch_to(me, next(), false);
  acquire(&barrier.clocks[phase]);
  return me->count;
}

void emu_warp(uint32_t mask, WarpOp op, int argument, const void* in, void* out, const char* file, int line) {
  Fibre* me = current();
  if (!(mask >> me->lane & 1)) fail("a lane is not in its own mask", file, line);
  me->mask = mask;
  me->op = op;
  me->argument = argument;
  me->in = in;
  me->out = out;
  me->file = file;
  me->line = line;
  me->state = State::in_warp;
  char* clock = &warp_clocks[static_cast<size_t>(me->warp)];
  if (op == WarpOp::sync) release(clock);  // a shuffle or an mma orders no memory
  try_warp(me->warp);
  switch_to(me, next(), false);
  if (op == WarpOp::sync) acquire(clock);
}

void emu_launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>* body) {
  read_environment();
  const unsigned count = block.x * block.y * block.z, most = 65535;
  if (!count || count > 1024 || !grid.x || !grid.y || !grid.z || grid.y > most || grid.z > most ||
      shared_bytes > 227 * 1024) {
    launch_error = cudaErrorInvalidConfiguration;
    return;
  }
  kernel = body;
  threads = static_cast<int>(count);
  make_fibres(threads);
  warp_clocks.assign((count + 31) / 32, 0);
  if (__tsan_get_current_fiber) host.tsan = __tsan_get_current_fiber();
  failed = false;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x && !failed; ++x) {
        begin_block_memory(shared_bytes);
        release(&begin_clock);  // after the memory is filled, or the fill would race
        run_block(grid, block, make_uint3(x, y, z));
        if (!apart) acquire(&end_clock);
        end_block_memory(apart);
      }
  emu_current = nullptr;
  acquire(&end_clock);
  end_launch_memory();
  if (failed) launch_error = cudaErrorLaunchFailure;
}

void emu_schedule(int wanted, uint64_t seed) {  // 0 forward, 1 reverse, 2 random
  read_environment();
  order = static_cast<Order>(wanted);
  random_bits.seed(seed);
}

const char* emu_message() { return message.c_str(); }
}

}  // namespace emu
