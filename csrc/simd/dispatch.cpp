// Which table of kernels runs: chosen once by what the processor has, or named for tests and measurements.
#include "simd/dispatch.h"

#include <atomic>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastpeft {

// Of isa_<name>.cpp; null where the compiler or the architecture has no such thing.
const Kernels* kernels_amx_bf16();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_base();

namespace {

#if defined(__x86_64__)
#define FP_HAS(feature) static_cast<bool>(__builtin_cpu_supports(feature))
#else
#define FP_HAS(feature) false
#endif

bool has_avx512() {
  return FP_HAS("avx512f") && FP_HAS("avx512bw") && FP_HAS("avx512dq") && FP_HAS("avx512vl") && FP_HAS("bmi2");
}

bool has_avx512_bf16() { return has_avx512() && FP_HAS("avx512bf16") && FP_HAS("avx512vbmi"); }

// Whether this process may use tiles of bf16: the processor has them, and the kernel, asked for them, agrees to save
// them.
bool may_use_tiles() {
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

struct Isa {
  const char* name;
  const Kernels* (*table)();
  bool (*runs)();
};

// The best first.
constexpr Isa kIsas[] = {
    {"amx_bf16", kernels_amx_bf16, [] { return has_avx512_bf16() && FP_HAS("avx512vnni") && may_use_tiles(); }},
    {"avx512_bf16", kernels_avx512_bf16, has_avx512_bf16},
    {"avx512", kernels_avx512, has_avx512},
    {"avx2", kernels_avx2, [] { return FP_HAS("avx2") && FP_HAS("fma"); }},
    {"base", kernels_base, [] { return true; }},
};

// Of this name, or the best for "auto"; null where it does not run here.
const Kernels* find(const std::string& name) {
  for (const Isa& isa : kIsas)
    if ((name == "auto" || name == isa.name) && isa.table() && isa.runs()) return isa.table();
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  if (!table) chosen.store(table = find("auto"), std::memory_order_relaxed);
  return *table;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) names.emplace_back(isa.name);
  return names;
}

bool set_isa(const std::string& name) {
  const Kernels* table = find(name);
  if (table) chosen.store(table, std::memory_order_relaxed);
  return table != nullptr;
}

}  // namespace fastpeft
