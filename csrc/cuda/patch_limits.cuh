// How the work of the patch kernels is cut. No bits depend on these but by kPatchShared: larger images keep off the tensor cores.
#pragma once

#include <cstdint>

namespace pyattr::cuda {

constexpr int64_t kPatchShared = 96 << 10;           // bytes of shared memory: what every card of compute capability 8.0 or more has
constexpr int64_t kPatchPlaneFloats = int64_t{1} << 24;  // of the images at work together, and of the query's windows
constexpr int64_t kPatchTileFloats = int64_t{1} << 24;   // of tiles of distances that do not fit into shared memory
constexpr int64_t kPatchTileBlocks = 512;            // thread blocks with such a tile, at most
constexpr int64_t kPatchGrid = int64_t{1} << 16;     // thread blocks of a launch, at most; they take their work in turns
constexpr int64_t kPatchFixedBlocks = 8192;          // thread blocks of a launch on tensor cores, about

}  // namespace pyattr::cuda
