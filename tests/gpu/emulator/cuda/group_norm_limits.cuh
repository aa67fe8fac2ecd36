// The emulator's version: few blocks, so that small problems have several tangents and several groups to a block.
#pragma once

#include <cstdint>

namespace pyattr::cuda {

constexpr int64_t kGroupNormBlocksWanted = 8;
constexpr int64_t kGroupNormMostBlocks = 5;

}  // namespace pyattr::cuda
