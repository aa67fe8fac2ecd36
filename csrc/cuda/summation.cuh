// The order of summation, which is part of the result: these numbers may not follow the device.
#pragma once

#include <cstdint>

namespace pyattr::cuda {

constexpr int64_t kChunkColumns = 65536;         // summed in registers before they are added to the workspace
constexpr int64_t kMinRangeBlocks = 8;           // blocks of 128 columns: a range costs about two of them to start and end
constexpr int64_t kMinRanges = 8, kMaxRanges = 64;
constexpr int64_t kRangeRows = int64_t{1} << 18;  // ranges * outputs, which bounds the workspace

// How the work is cut into launches; no bits depend on these.
constexpr int64_t kSlabRows = 32768;    // outputs per launch
constexpr int64_t kLaunchSamples = 64;  // samples per launch, hence at most 64 * 2^18 * 4 B = 64 MiB of workspace

// The sparse projection: the same, and as many samples in a launch as 64 MiB of workspace hold.
constexpr int64_t kSketchChunkTiles = 1024;  // tiles summed in registers before they are added to the workspace
constexpr int64_t kSketchMaxRanges = 2048;
constexpr int64_t kSketchRangeRows = int64_t{1} << 19;     // ranges * outputs
constexpr int64_t kSketchRangeWidths = 16;                 // a range has at least 16 D columns: its sums are then 1/16 of its input
constexpr int64_t kSketchLaunchOutputs = int64_t{1} << 24;  // ranges * outputs * samples
constexpr int64_t kSketchLaunchSamples = int64_t{1} << 14;

}  // namespace pyattr::cuda
