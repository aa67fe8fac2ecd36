// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) and the two random matrices built on it.
// The same header serves CPU and CUDA, so both make the same bits.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYATTR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYATTR_HOST_DEVICE static inline
#endif

namespace pyattr {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxBlock {
  uint32_t word[4];
};

// counter = (c0, c1, c2, c3), key = (k0, k1).
PYATTR_HOST_DEVICE PhiloxBlock philox4x32_10(uint32_t c0, uint32_t c1, uint32_t k0, uint32_t k1, uint32_t c2 = 0,
                                             uint32_t c3 = 0) {
  uint32_t x0 = c0, x1 = c1, x2 = c2, x3 = c3;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * x0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * x2;
    x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(p1);
    x2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{x0, x1, x2, x3}};
}

// One Philox call makes kSignsPerCall consecutive columns of one row of the sign matrix, or kNormalsPerCall of the normal one.
constexpr int64_t kSignsPerCall = 128;
constexpr int64_t kNormalsPerCall = 4;

}  // namespace pyattr
