// Where the signs of a block of 128 columns sit in the registers of mma.m16n8k16, and how they become +-1.
//
// A Philox call makes 128 signs of one row in four words. The four lanes of a quad hold the same rows of the A operand, and
// the k-slots of a product may hold the columns in any order as long as B is staged in the same one. So lane t keeps word
// t, and slot (step s of 8, register half r of 2, lane t of 4, half e of 2) is column 32 t + 15 + 16 e - (2 s + r): bit 15
// - j of the word for e = 0 and bit 31 - j for e = 1, with j = 2 s + r. One shift brings both to the sign bits of a
// register of two 16-bit floats, and one LOP3 makes it two of +-1: one instruction per sign, for every word, no table.
#pragma once

#include "common/philox.h"

namespace pyattr::cuda {

// The column in a block, 0..127, that sits in a slot.
PYATTR_HOST_DEVICE int sign_slot_column(int step, int half_register, int lane, int half) {
  return 32 * lane + 15 + 16 * half - 2 * step - half_register;
}

// The register of position j = 2 * step + half_register. `minus_ones`: -1 twice in the operand's type; a set bit means +1.
PYATTR_HOST_DEVICE uint32_t expand_signs(uint32_t word, int j, uint32_t minus_ones) {
  return ((word << j) & 0x80008000u) ^ minus_ones;
}

// The ten round keys of Philox, so that a kernel reads them from its arguments instead of adding them up in every call.
struct PhiloxKeys {
  uint32_t k0[kPhiloxRounds];
  uint32_t k1[kPhiloxRounds];
};

inline PhiloxKeys philox_keys(uint32_t k0, uint32_t k1) {
  PhiloxKeys keys;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.k0[round] = k0 + static_cast<uint32_t>(round) * kPhiloxW0;
    keys.k1[round] = k1 + static_cast<uint32_t>(round) * kPhiloxW1;
  }
  return keys;
}

PYATTR_HOST_DEVICE PhiloxBlock philox4x32_10(uint32_t c0, uint32_t c1, const PhiloxKeys& keys) {
  uint32_t x0 = c0, x1 = c1, x2 = 0, x3 = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * x0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * x2;
    x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ keys.k0[round];
    x1 = static_cast<uint32_t>(p1);
    x2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ keys.k1[round];
    x3 = static_cast<uint32_t>(p0);
  }
  return {{x0, x1, x2, x3}};
}

}  // namespace pyattr::cuda
