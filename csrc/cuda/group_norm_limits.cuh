// How group_norm_silu_jvp is cut into thread blocks; no bits depend on it.
#pragma once

#include <cstdint>

namespace pyattr::cuda {

constexpr int64_t kGroupNormBlocksWanted = 2048;
constexpr int64_t kGroupNormMostBlocks = 1 << 30;  // of a launch

}  // namespace pyattr::cuda
