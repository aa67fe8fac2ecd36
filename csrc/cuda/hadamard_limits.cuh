// The Hadamard kernel's sizes, which are part of the order of summation: these numbers may not follow the device.
#pragma once

#include <cstdint>

namespace pyattr::cuda {

constexpr int kHadamardFewestBits = 10, kHadamardMostBits = 13;  // of a block of columns: 32 KB of shared memory
constexpr int64_t kHadamardMaxRanges = 256;                      // of blocks, summed apart
constexpr int64_t kHadamardRangeRows = int64_t{1} << 20;         // ranges * outputs, where there are fewer outputs

// How the work is cut into launches; no bits depend on it.
constexpr int64_t kHadamardPartials = int64_t{1} << 24;  // floats of a launch's partial sums: 64 MiB

}  // namespace pyattr::cuda
