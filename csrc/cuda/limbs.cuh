// A float32 as an exact sum of bfloat16 limbs, largest first, so that bfloat16 tensor cores multiply float32 numbers.
#pragma once

#include "cuda/exact_float.cuh"

namespace pyattr::cuda {

// Limb l is the upper half of limb[l]; the lower half is zero. A limb takes the leading 8 bits of what is left and the rest
// is exact, so 3 limbs hold every float32 above 2^-110 in full, 2 limbs every float16, 1 limb every bfloat16. Below 2^-110
// at most 2^-133 is lost. An infinity is the first limb alone (inf - inf would make it a NaN); a NaN stays a NaN in every
// limb after the first, even where its payload does not survive in the first.
template <int kLimbs>
PYATTR_HOST_DEVICE void split_limbs(uint32_t bits, uint32_t (&limb)[kLimbs]) {
  if constexpr (kLimbs == 1) {
    limb[0] = bits;
  } else {
    const bool infinite = (bits & 0x7FFFFFFFu) == 0x7F800000u;
    limb[0] = bits & 0xFFFF0000u;
    float rest = infinite ? 0.0f : add(float_of(bits), -float_of(limb[0]));
    for (int l = 1; l < kLimbs; ++l) {
      limb[l] = bits_of(rest) & 0xFFFF0000u;
      rest = add(rest, -float_of(limb[l]));
    }
  }
}

// The upper halves of two words in one register: `low` in the lower half.
PYATTR_HOST_DEVICE uint32_t pack_upper(uint32_t low, uint32_t high) { return (low >> 16) | (high & 0xFFFF0000u); }

}  // namespace pyattr::cuda
