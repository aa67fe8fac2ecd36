// Where a block of 128 columns of G lies in shared memory: first as it came (raw), then as B operands of mma.m16n8k16 (operand),
// one copy per limb. Both are addressed in chunks of 16 bytes, and the lanes that share a memory phase always touch different
// banks.
#pragma once

#include "common/philox.h"

namespace pyattr::cuda {

constexpr int kBlockColumns = 128;  // columns of the matrix worked on at a time: one Philox call of the sign matrix
constexpr int kQuarters = 4;        // of a block: two products of depth 16 each

// Byte of a chunk of one sample's 128 columns. The exclusive or spreads the 4 lanes and 2 samples of a phase.
template <int kElementBytes>
PYATTR_HOST_DEVICE int raw_offset(int sample, int chunk) {
  return sample * kBlockColumns * kElementBytes + (chunk ^ ((chunk >> 3) | ((sample & 1) << (kElementBytes / 2)))) * 16;
}

// Byte of one lane's four registers for one sample and quarter: b0, b1 of the first product, then of the second.
template <int kSamples>
PYATTR_HOST_DEVICE int operand_offset(int sample, int lane, int quarter) {
  return ((quarter * kSamples + sample) * 4 + lane) * 16;
}

// The work of turning raw into operand, in units of four registers. Low to high bits of the index: lane (2), sample mod 2,
// quarter mod 2, the other samples, quarter div 2.
struct StageUnit {
  int sample, lane, quarter;
};
template <int kSamples>
PYATTR_HOST_DEVICE StageUnit stage_unit(int index) {
  const int rest = index >> 4;
  return {2 * (rest % (kSamples / 2)) + ((index >> 2) & 1), index & 3, 2 * (rest / (kSamples / 2)) + ((index >> 3) & 1)};
}

}  // namespace pyattr::cuda
