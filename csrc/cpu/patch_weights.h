// exp(-(d - m) / (2 sigma^2)) of one position's distances to a block of images, m each image's least; internal linkage throughout.
//
// 2^z with z = (m - d) log2(e) / (2 sigma^2): z = n + f with |f| <= 1/2, 2^f by a polynomial of degree 5 whose relative error is below
// 1.1e-7; in all, with z's own rounding, below 2.5e-7 + 1.2e-7 |ln 2^z|. Below 2^-126 it is 0, certainly, so that whole vectors of such
// are not evaluated; what that leaves out of a sum of V weights is less than 2^-126 V of the largest.
#pragma once

#include <cstring>

#include "cpu/patch_lanes.h"

namespace pyattr::cpu {
namespace {

constexpr float kLargest = 0x1.fffffep127f;
constexpr int64_t kGroup = 4;     // vectors of weights evaluated or left out together, and partial sums
constexpr int64_t kRun = 64;      // vectors of a partial sum
constexpr int64_t kClasses = 16;  // of distances, every 16th one a class

inline reg minimum(reg a, reg b) {  // b where either is NaN
#if defined(__AVX512F__)
  return (reg)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (reg)_mm256_min_ps((__m256)a, (__m256)b);
#else
  for (int i = 0; i < kRegisterLanes; ++i) b[i] = a[i] < b[i] ? a[i] : b[i];
  return b;
#endif
}

inline reg maximum(reg a, reg b) {  // likewise
#if defined(__AVX512F__)
  return (reg)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (reg)_mm256_max_ps((__m256)a, (__m256)b);
#else
  for (int i = 0; i < kRegisterLanes; ++i) b[i] = a[i] > b[i] ? a[i] : b[i];
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

// The least of each class of `count` vectors, at most the largest float; anything where a distance is NaN.
inline void class_minima(const reg* d, int64_t count, reg* least) {
  reg found[kClasses];
  for (reg& x : found) x = splat(kLargest);
  int64_t i = 0;
  for (; i + kClasses <= count; i += kClasses) {
#pragma GCC unroll 16
    for (int c = 0; c < kClasses; ++c) found[c] = minimum(found[c], d[i + c]);
  }
  for (int c = 0; c < kClasses; ++c) least[c] = i + c < count ? minimum(found[c], d[i + c]) : found[c];
}

inline reg least_of(const reg* least) {
  reg m = least[0];
  for (int c = 1; c < kClasses; ++c) m = minimum(m, least[c]);
  return m;
}

// Weights of distances d to the image whose least is m: 2^((d - m) slope), 0 where d - m > reach; NaN for NaN.
struct Exponential {
  reg m, limit;  // no d beyond the limit has a weight
  float slope, reach;

  Exponential(reg least, float log2_slope) : m(least), slope(log2_slope) {
    // Of 2^-126, rounded so that no exponent underflows. An infinite distance is always beyond.
    reach = std::min(-126.0f / slope * 0.999999f, kLargest);
    limit = minimum(m + splat(reach * 1.000001f), splat(kLargest));
  }

  inline ireg none(reg x) const { return (ireg)(x > splat(reach)); }

  // The weight of m + x. A NaN stays one since the last nine bits of every NaN are 0 here, see plain_nan.
  inline reg weigh(reg x) const {
    const reg shifted = multiply_add(x, splat(slope), splat(0x1.8p23f));  // whose last bits are n
    const reg f = multiply_add(x, splat(slope), 0x1.8p23f - shifted);
    reg p = multiply_add(splat(0.001326472731307149f), f, splat(0.009671512991189957f));
    p = multiply_add(p, f, splat(0.05550733581185341f));
    p = multiply_add(p, f, splat(0.24022242426872253f));
    p = multiply_add(p, f, splat(0.6931470036506653f));
    p = multiply_add(p, f, splat(1.0f));
    // p lies within [0.7, 1.42], and the result is no less than 2^-126: its exponent takes n.
    return (reg)((ireg)((ureg)p + ((ureg)shifted << 23)) & ~none(x));
  }

  inline reg operator()(reg d) const { return weigh(d - m); }
};

// The sum of the weights of `count` vectors. take(i, d, w) is told of vectors i, leave(i) of the first of a group of them whose weights
// are all 0; beyond the last come infinite distances that fill up the group.
template <typename Take, typename Leave>
inline reg weigh(const reg* d, int64_t count, const Exponential& weight, const Take& take, const Leave& leave) {
  reg total{};
  for (int64_t run = 0; run < count; run += kRun) {
    reg sum[kGroup] = {};
    const int64_t end = std::min(count, run + kRun);
    for (int64_t i = run; i < end; i += kGroup) {
      // The next position's distances follow these, in a third-level cache.
      const char* const following = reinterpret_cast<const char*>(d) + (count + i) * static_cast<int64_t>(sizeof(reg));
      for (size_t at = 0; at < kGroup * sizeof(reg); at += 64) __builtin_prefetch(following + at);
      reg near[kGroup];
      if (i + kGroup <= end) {
        for (int g = 0; g < kGroup; ++g) near[g] = d[i + g];
      } else {
        for (int g = 0; g < kGroup; ++g) near[g] = i + g < end ? d[i + g] : splat(HUGE_VALF);
      }
      ireg dead = splat(int32_t{-1});
      for (int g = 0; g < kGroup; ++g) dead &= weight.none(near[g] - weight.m);
      if (!any(~dead)) {
        leave(i);
        continue;
      }
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) {
        const reg w = weight(near[g]);
        sum[g] += w;
        take(i + g, near[g], w);
      }
    }
    total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  return total;
}

}  // namespace
}  // namespace pyattr::cpu
