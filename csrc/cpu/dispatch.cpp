// Chooses the instruction-set level once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.hpp"

namespace po_kernels {

#define PK_DECLARE(name, type) Verdict name(const type&);
#define PK_ENTRY(name, type) name,
#define PK_DECLARE_LEVEL(name)                       \
  namespace kernels_##name {                         \
    PK_FOR_EACH_KERNEL(PK_DECLARE)                   \
    constexpr KernelTable table(const char* level) { \
      return {level, PK_FOR_EACH_KERNEL(PK_ENTRY)};  \
    }                                                \
  }

PK_DECLARE_LEVEL(default)
#if defined(PK_HAS_x86_64_v3)
PK_DECLARE_LEVEL(x86_64_v3)
#endif
#if defined(PK_HAS_x86_64_v4)
PK_DECLARE_LEVEL(x86_64_v4)
#endif

namespace {

// Best first.
constexpr KernelTable kTables[] = {
#if defined(PK_HAS_x86_64_v4)
    kernels_x86_64_v4::table("x86-64-v4"),
#endif
#if defined(PK_HAS_x86_64_v3)
    kernels_x86_64_v3::table("x86-64-v3"),
#endif
    kernels_default::table("default"),
};

bool supported(const std::string& level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level == "x86-64-v4") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && supported("x86-64-v3");
  }
  if (level == "x86-64-v3") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
  }
#endif
  return level == "default";
}

const KernelTable& choose() {
  const char* variable = std::getenv("PO_KERNELS_SIMD");
  const std::string asked = variable == nullptr ? "" : variable;
  std::string usable;
  for (const KernelTable& table : kTables) {
    const std::string level = table.level;
    if (!supported(level)) continue;
    if (asked.empty() || level == asked) return table;
    usable += (usable.empty() ? "" : ", ") + level;
  }
  throw std::runtime_error("PO_KERNELS_SIMD: expected a level that is built and that this processor supports (" +
                           usable + "), got " + asked);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace po_kernels
