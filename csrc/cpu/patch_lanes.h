// Vectors of one float for each image of a block, as the patch kernels of one SIMD level have them; internal linkage throughout.
#pragma once

#include <algorithm>

#include "cpu/patch_plan.h"
#include "cpu/registers.h"

namespace pyattr::cpu {
namespace {

constexpr int64_t kLanes = kRegisterLanes;  // images of a block
using reg = register_t<kRegisterLanes>;
typedef int32_t ireg __attribute__((vector_size(4 * kRegisterLanes)));
typedef uint32_t ureg __attribute__((vector_size(4 * kRegisterLanes)));  // where bits may run over

inline ireg splat(int32_t x) { return ireg{} + x; }

}  // namespace
}  // namespace pyattr::cpu
