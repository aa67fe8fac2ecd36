// The emulator's version of csrc/cuda/patch_limits.cuh: small numbers, so that tiny problems take several launches, blocks that work in
// turns, and tiles of distances outside shared memory.
#pragma once

#include <cstdint>

namespace pyattr::cuda {

constexpr int64_t kPatchShared = 8192;
constexpr int64_t kPatchPlaneFloats = 600;
constexpr int64_t kPatchTileFloats = 20000;
constexpr int64_t kPatchTileBlocks = 3;
constexpr int64_t kPatchGrid = 50;
constexpr int64_t kPatchFixedBlocks = 4;

}  // namespace pyattr::cuda
