// The emulator's version of csrc/cuda/summation.cuh: small numbers, so that tiny problems have many chunks, ranges and slabs.
#pragma once

#include <cstdint>

namespace pyattr::cuda {

constexpr int64_t kChunkColumns = 384;
constexpr int64_t kMinRangeBlocks = 2;
constexpr int64_t kMinRanges = 2, kMaxRanges = 3;
constexpr int64_t kRangeRows = 1024;
constexpr int64_t kSlabRows = 512;
constexpr int64_t kLaunchSamples = 64;

constexpr int64_t kSketchChunkTiles = 16;
constexpr int64_t kSketchMaxRanges = 3;
constexpr int64_t kSketchRangeRows = 4096;
constexpr int64_t kSketchRangeWidths = 2;
constexpr int64_t kSketchLaunchOutputs = 32768;
constexpr int64_t kSketchLaunchSamples = 20;

}  // namespace pyattr::cuda
