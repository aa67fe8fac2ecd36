// The emulator's version of csrc/cuda/hadamard_limits.cuh: small numbers, so that tiny problems have many blocks, ranges and launches.
#pragma once

#include <cstdint>

namespace pyattr::cuda {

constexpr int kHadamardFewestBits = 7, kHadamardMostBits = 8;
constexpr int64_t kHadamardMaxRanges = 3;
constexpr int64_t kHadamardRangeRows = 1024;

constexpr int64_t kHadamardPartials = 4096;

}  // namespace pyattr::cuda
