// Where a block of 128 columns of G lies in shared memory: first as it came (raw), then as B operands of mma.m16n8k16
// (operand), one copy per limb. Both are addressed in chunks of 16 bytes, and the lanes that share a memory phase always
// touch different banks.
#pragma once

#include "common/philox.h"

#if defined(__CUDACC__)
#define PYATTR_HOST_DEVICE_MEMBER static __host__ __device__ __forceinline__
#else
#define PYATTR_HOST_DEVICE_MEMBER static inline
#endif

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

// Which of a sample's 128 columns go into the four registers of a lane and quarter: two groups of four neighbours. Half e
// of register j is element pair_element(j, e) of group pair_group(j, e). A matrix says so in a struct like those below.

// Signs: register j = 2 (step mod 2) + half_register of a quarter holds columns 32 t + 15 + 16 e - (4 quarter + j), because
// that is where one shift of a Philox word puts their signs (sign_fragment.cuh).
struct SignSlots {
  PYATTR_HOST_DEVICE_MEMBER int group_column(int lane, int quarter, int group) {
    return 32 * lane + 12 - 4 * quarter + 16 * group;
  }
  PYATTR_HOST_DEVICE_MEMBER int pair_group(int, int e) { return e; }
  PYATTR_HOST_DEVICE_MEMBER int pair_element(int j, int) { return 3 - j; }
};

// Normals: lane t's four slots of step s are columns 16 s + 4 t .. + 3, one Philox call; a quarter holds two steps.
struct NormalSlots {
  PYATTR_HOST_DEVICE_MEMBER int group_column(int lane, int quarter, int group) {
    return 32 * quarter + 16 * group + 4 * lane;
  }
  PYATTR_HOST_DEVICE_MEMBER int pair_group(int j, int) { return j / 2; }
  PYATTR_HOST_DEVICE_MEMBER int pair_element(int j, int e) { return 2 * (j % 2) + e; }
};

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
