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

}  // namespace pyattr::cuda
