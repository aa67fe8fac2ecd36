// What a thread of the Hadamard projection computes: some samples times one chunk of blocks.
#pragma once

#include <cstdint>

#include "common/project_args.h"

namespace pyattr::cpu {

constexpr int64_t kHadamardPadRows = 16;  // rows come in whole vectors

// sums[s * padded + j] = sum over the blocks of (-1)^popcount(high[j] & block) * transform(block)[low[j]], s in [0, num_samples).
struct HadamardTile {
  const ProjectArgs* args;
  int64_t sample_begin, num_samples;
  int64_t block_begin, block_end;  // of 2^block_bits columns
  int block_bits;                  // at least 7
  const uint32_t* low;             // [padded]: the row's bits inside a block
  const uint32_t* high;            // [padded]: its bits above
  int64_t padded;                  // D rounded up to a multiple of kHadamardPadRows
  float* sums;                     // [num_samples, padded]
};

using HadamardKernel = void (*)(const HadamardTile&);

}  // namespace pyattr::cpu
