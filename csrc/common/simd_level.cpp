#include "common/simd_level.h"

#include <cstdlib>
#include <stdexcept>

namespace pyattr {

const char* name(SimdLevel level) {
  switch (level) {
    case SimdLevel::avx512: return "avx512";
    case SimdLevel::avx2: return "avx2";
    default: return "scalar";
  }
}

std::vector<SimdLevel> simd_levels() {
  std::vector<SimdLevel> levels{SimdLevel::scalar};
#if defined(PYATTR_X86)
  __builtin_cpu_init();  // also asks the operating system whether it saves the wide registers
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2")) {
    levels.push_back(SimdLevel::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      levels.push_back(SimdLevel::avx512);
    }
  }
#endif
  return levels;
}

SimdLevel simd_level() {
  static const SimdLevel chosen = [] {
    const std::vector<SimdLevel> levels = simd_levels();
    const char* wanted = std::getenv("PYATTR_SIMD");
    if (wanted == nullptr || *wanted == '\0') return levels.back();
    std::string usable;
    for (SimdLevel level : levels) {
      if (std::string(wanted) == name(level)) return level;
      usable += (usable.empty() ? "" : ", ") + std::string(name(level));
    }
    throw std::runtime_error("PYATTR_SIMD must be one of " + usable + " on this machine, got '" + wanted + "'");
  }();
  return chosen;
}

}  // namespace pyattr
