// Which table of kernels runs: chosen once by what the processor has, or named for tests and measurements.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "cpu_kernels.h"

namespace fastpeft {
namespace {

bool runs(const Kernels* table) {
  if (!table) return false;
#if defined(__x86_64__)
  const bool bf16 = !std::strcmp(table->name, "avx512_bf16");
  if (bf16 || !std::strcmp(table->name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           (!bf16 || __builtin_cpu_supports("avx512bf16"));
  if (!std::strcmp(table->name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

const Kernels* best() {
  for (const Kernels* table : {kernels_avx512_bf16(), kernels_avx512(), kernels_avx2()})
    if (runs(table)) return table;
  return kernels_base();
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
  for (const Kernels* table : {kernels_avx512_bf16(), kernels_avx512(), kernels_avx2(), kernels_base()})
    if (table && !std::strcmp(table->name, name) && runs(table)) {
      chosen.store(table, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace fastpeft
