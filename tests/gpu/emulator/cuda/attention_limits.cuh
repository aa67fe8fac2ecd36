// The emulator's version of csrc/cuda/attention_limits.cuh: small numbers, so that tiny problems take several waves and thread blocks that
// work in turns.
#pragma once

#include <cstdint>

namespace pyattr::cuda {

constexpr int64_t kAttentionProbabilities = 6000;
constexpr int64_t kAttentionGrid = 3;

}  // namespace pyattr::cuda
