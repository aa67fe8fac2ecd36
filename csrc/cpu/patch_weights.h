// exp(-(d - m) / (2 sigma^2)) of one position's distances to a block of images, m each image's least; internal linkage throughout.
//
// 2^z with z = (m - d) log2(e) / (2 sigma^2): z = n + f with |f| <= 1/2, 2^f by a polynomial of degree 5 whose relative error is below
// 1.1e-7, in all below 2.5e-7 + 1.2e-7 |ln 2^z|. Below 2^-126 it is 0: certain for whole vectors of such, which are not evaluated; what
// that leaves out of a sum of V weights is less than 2^-126 V of the largest.
#pragma once

#include "cpu/patch_distances.h"

namespace pyattr::cpu {
namespace {

constexpr float kLargest = 0x1.fffffep127f;
constexpr int64_t kGroup = 4;      // vectors of weights evaluated or left out together, and partial sums
constexpr int64_t kRun = 64;       // vectors of a partial sum

inline reg minimum(reg a, reg b) {  // b where a is not less, so a NaN in a does not count
#if defined(__AVX512F__)
  return (reg)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (reg)_mm256_min_ps((__m256)a, (__m256)b);
#else
  for (int i = 0; i < kRegisterLanes; ++i) b[i] = a[i] < b[i] ? a[i] : b[i];
  return b;
#endif
}

inline bool any(ireg mask) {  // each lane 0 or -1
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < kRegisterLanes; ++i) all |= mask[i];
  return all != 0;
#endif
}

// The lanes of the images that there are.
inline void store(reg value, int64_t images, float* to) {
  std::memcpy(to, &value, static_cast<size_t>(images) * sizeof(float));
}

inline reg blend(ireg mask, reg a, reg b) { return (reg)(((ireg)a & mask) | ((ireg)b & ~mask)); }

// The least of `count` vectors, at most the largest float.
inline reg least(const reg* d, int64_t count) {
  reg found[kGroup];
  for (reg& x : found) x = splat(kLargest);
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup)
    for (int g = 0; g < kGroup; ++g) found[g] = minimum(d[i + g], found[g]);
  for (; i < count; ++i) found[0] = minimum(d[i], found[0]);
  return minimum(minimum(found[0], found[1]), minimum(found[2], found[3]));
}

// 2^z for z <= 0, 0 below 2^-126, NaN for NaN.
inline reg exp2(reg z) {
  const reg shifted = z + 0x1.8p23f, f = z - (shifted - 0x1.8p23f);  // the sum's last bits are n
  reg p = multiply_add(splat(0.001326472731307149f), f, splat(0.009671512991189957f));
  p = multiply_add(p, f, splat(0.05550733581185341f));
  p = multiply_add(p, f, splat(0.24022242426872253f));
  p = multiply_add(p, f, splat(0.6931470036506653f));
  p = multiply_add(p, f, splat(1.0f));
  const reg power = (reg)(((ireg)shifted << 23) + splat(int32_t{0x3f800000}));
  return (reg)((ireg)(p * power) & ~(ireg)(z < -126.0f));
}

struct Weights {
  reg sum;
  int64_t count;  // of the vectors kept
};

// kept = the weights 2^(slope (d - m)), slope < 0: with `pack` only those of groups of vectors that are not all 0, in their order. The
// last group is filled up with zeros.
template <bool pack>
inline Weights weigh(const reg* d, int64_t count, reg m, float slope, reg* kept) {
  const reg limit = m + splat(-126.0f / slope) * 1.000001f;  // rounded up: no more is left out than would be 0
  reg total{};
  reg* to = kept;
  for (int64_t run = 0; run < count; run += kRun) {
    reg sum[kGroup] = {};
    const int64_t end = std::min(count, run + kRun);
    for (int64_t i = run; i < end; i += kGroup) {
      ireg live{};
      reg near[kGroup];
      for (int64_t g = 0; g < kGroup; ++g) {
        near[g] = i + g < end ? d[i + g] : splat(HUGE_VALF);
        live |= ~(ireg)(near[g] > limit);
      }
      if (any(live)) {
        for (int64_t g = 0; g < kGroup; ++g) {
          to[g] = exp2((near[g] - m) * slope);
          sum[g] += to[g];
        }
      } else if (pack) {
        continue;
      } else {
        std::fill_n(to, kGroup, reg{});
      }
      to += kGroup;
    }
    total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  return {total, to - kept};
}

}  // namespace
}  // namespace pyattr::cpu
