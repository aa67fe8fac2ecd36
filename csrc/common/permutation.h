// A seeded bijection of [0, 2^bits), bits <= 62, evaluated index by index: a Feistel network whose halves are at most 31 bits wide.
//
// In half-round t one half (the upper bits / 2 bits in even rounds, the lower ones in odd rounds) is exclusive-ored with the low bits
// of word 0 of Philox4x32-10(counter = (other half, t, 3, 0), key = (seed, stream)). 6 half-rounds, 24 for fewer than 8 bits, where 6
// leave pairs of indices far from uniform. Luby and Rackoff, SIAM J. Comput. 17 (1988). The same header serves CPU and CUDA.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace pyattr {

constexpr uint32_t kPermutationWord = 3;  // third counter word; the dense matrices have 0
constexpr uint32_t kHalfRounds = 6, kSmallHalfRounds = 24;
constexpr int kSmallBits = 8;

PYATTR_HOST_DEVICE int64_t permute_bits(int64_t index, int bits, uint32_t seed, uint32_t stream) {
  const int right_bits = bits - bits / 2;
  const uint32_t left_mask = (uint32_t{1} << (bits / 2)) - 1, right_mask = (uint32_t{1} << right_bits) - 1;
  uint32_t left = static_cast<uint32_t>(index >> right_bits), right = static_cast<uint32_t>(index) & right_mask;
  const uint32_t rounds = bits >= kSmallBits ? kHalfRounds : kSmallHalfRounds;
  for (uint32_t t = 0; t < rounds; ++t) {
    if (t % 2 == 0) {
      left ^= philox4x32_10(right, t, seed, stream, kPermutationWord).word[0] & left_mask;
    } else {
      right ^= philox4x32_10(left, t, seed, stream, kPermutationWord).word[0] & right_mask;
    }
  }
  return static_cast<int64_t>(left) << right_bits | right;
}

}  // namespace pyattr
