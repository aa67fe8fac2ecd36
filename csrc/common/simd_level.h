// The instruction set that CPU kernels use, chosen once per process.
#pragma once

#include <string>
#include <vector>

namespace pyattr {

enum class SimdLevel { scalar = 0, avx2 = 1, avx512 = 2 };

// The level that PYATTR_SIMD names, or the highest that the processor and the operating system allow. Throws std::runtime_error when PYATTR_SIMD
// names no level or one that this machine lacks.
SimdLevel simd_level();

// Every level this machine can run, lowest first.
std::vector<SimdLevel> simd_levels();

const char* name(SimdLevel level);

}  // namespace pyattr
