// Which table of kernels runs: chosen once by what the processor has, or named for tests and measurements.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "cpu_kernels.h"
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastpeft {
namespace {

// Whether this process may use tiles of bf16: the processor has them, and the kernel, asked for them, agrees to save them.
[[maybe_unused]] bool may_use_tiles() {
#if defined(FP_EMULATED_TILES)
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // CPUID leaf 7, edx
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  constexpr long kRequestState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of <asm/prctl.h>, since Linux 5.16
  return syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
#else
  return false;
#endif
}

bool runs(const Kernels* table) {
#if defined(__x86_64__)
  const bool tiles = !std::strcmp(table->name, "amx_bf16"), bf16 = tiles || !std::strcmp(table->name, "avx512_bf16");
  if (bf16 || !std::strcmp(table->name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2") &&
           (!bf16 || (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"))) &&
           (!tiles || (__builtin_cpu_supports("avx512vnni") && may_use_tiles()));
  if (!std::strcmp(table->name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

// The first table, from the best on, that runs here and that `wanted` takes; or null.
template <class F>
const Kernels* first_table(F wanted) {
  for (const Kernels* table : {kernels_amx_bf16(), kernels_avx512_bf16(), kernels_avx512(), kernels_avx2(), kernels_base()})
    if (table && wanted(*table) && runs(table)) return table;
  return nullptr;
}

const Kernels* best() {
  return first_table([](const Kernels&) { return true; });
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  if (!table) chosen.store(table = best(), std::memory_order_relaxed);
  return *table;
}

bool set_isa(const char* name) {
  if (!std::strcmp(name, "auto")) {
    chosen.store(best(), std::memory_order_relaxed);
    return true;
  }
  const Kernels* table = first_table([name](const Kernels& one) { return !std::strcmp(one.name, name); });
  if (table) chosen.store(table, std::memory_order_relaxed);
  return table != nullptr;
}

}  // namespace fastpeft
