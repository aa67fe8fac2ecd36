// How the work on attention is cut. No bits depend on these.
#pragma once

#include <cstdint>

namespace pyattr::cuda {

constexpr int64_t kAttentionProbabilities = int64_t{1} << 24;  // floats of P at a time: 64 MiB
constexpr int64_t kAttentionGrid = int64_t{1} << 20;           // thread blocks of a launch, at most; they take their work in turns

}  // namespace pyattr::cuda
