// What one warp makes of the distances of one query window to the windows of one image: their minimum, the sum of
// exp(-(d - minimum) / (2 sigma^2)), the sum of its k largest terms, and where the minimum is. Sums are in a fixed order.
//
// The k-th largest term is found by bisection on the bits of d - minimum, which are ordered as the numbers are: at most 31
// looks, on natural images about 13, none where no more than k terms differ from 0 in float32. It is exact for every k, and ties
// need no choice: terms above the threshold are summed, and the threshold counts for the rest.
#pragma once

#include "cuda/device.cuh"
#include "cuda/exact_float.cuh"

namespace pyattr::cuda {

constexpr float kPatchDead = 150.0f;  // 2^-150 rounds to 0

struct PatchRow {
  float least;    // infinite where no distance is a finite number: the sum is then 0, or NaN
  float sum;
  int32_t place;  // the first value that is the minimum, or 0
};

__device__ __forceinline__ float patch_infinity() { return float_of(0x7F800000u); }

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = add(value, float_of(shuffle_xor(bits_of(value), mask)));
  return value;
}
__device__ __forceinline__ float warp_least(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = fminf(value, float_of(shuffle_xor(bits_of(value), mask)));
  return value;
}
__device__ __forceinline__ uint32_t warp_least(uint32_t value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(value, mask);
    value = other < value ? other : value;
  }
  return value;
}
__device__ __forceinline__ uint32_t warp_count(uint32_t value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// A row of up to 32 * kHeld values in registers, and a row that is read again for every look; less what `subtract` was told.
template <int kHeld>
struct HeldValues {
  float held[kHeld];
  __device__ __forceinline__ HeldValues(const float* values, int count) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = lane + 32 * i < count ? values[lane + 32 * i] : patch_infinity();
  }
  __device__ __forceinline__ void subtract(float base) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = add(held[i], -base);
  }
  template <class Each>
  __device__ __forceinline__ void each(Each use) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) use(held[i], static_cast<int>(threadIdx.x % 32) + 32 * i);
  }
};
struct StreamedValues {
  const float* values;
  int count;
  float base = 0.0f;
  __device__ __forceinline__ StreamedValues(const float* values_, int count_) : values(values_), count(count_) {}
  __device__ __forceinline__ void subtract(float base_) { base = base_; }
  template <class Each>
  __device__ __forceinline__ void each(Each use) const {
    for (int i = threadIdx.x % 32; i < count; i += 32) use(add(values[i], -base), i);
  }
};

__device__ __forceinline__ float patch_term(float apart, float rate) { return exp2f(-multiply(apart, rate)); }

// Minimum, sum and place; leaves the values relative to the minimum, or as they are where that is infinite. `rate` is
// log2(e) / (2 sigma^2).
template <class Values>
__device__ __forceinline__ PatchRow patch_sum(Values& values, float rate) {
  PatchRow row{patch_infinity(), 0.0f, 0};
  values.each([&](float d, int) { row.least = fminf(row.least, d); });  // fminf passes over NaNs
  row.least = warp_least(row.least);
  values.subtract(row.least == patch_infinity() ? 0.0f : row.least);
  uint32_t place = 0xFFFFFFFFu;
  values.each([&](float apart, int i) {
    row.sum = add(row.sum, patch_term(apart, rate));
    if (apart == 0.0f && static_cast<uint32_t>(i) < place) place = static_cast<uint32_t>(i);
  });
  row.sum = warp_sum(row.sum);
  place = warp_least(place);
  row.place = place == 0xFFFFFFFFu ? 0 : static_cast<int32_t>(place);
  return row;
}

// The sum of the k largest terms, after patch_sum; count is how many values there are.
template <class Values>
__device__ __forceinline__ float patch_top(const Values& values, const PatchRow& row, int64_t k, int64_t count, float rate) {
  if (k >= count || row.sum != row.sum) return row.sum;
  const auto at_most = [&](uint32_t bits) {
    uint32_t found = 0;
    values.each([&](float apart, int) { found += bits_of(apart) <= bits; });
    return static_cast<int64_t>(warp_count(found));
  };
  uint32_t high = bits_of(kPatchDead / rate < 3e38f ? kPatchDead / rate : 3e38f);
  if (at_most(high) <= k) return row.sum;
  uint32_t low = 0;
  int64_t within = at_most(low);  // values no further than `low`
  if (within >= k) return static_cast<float>(k);
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const int64_t found = at_most(middle);
    if (found <= k) low = middle, within = found;
    if (found >= k) high = middle;
    if (found == k) break;
  }
  float top = 0.0f;
  values.each([&](float apart, int) {
    top = add(top, bits_of(apart) <= low ? patch_term(apart, rate) : 0.0f);
  });
  top = warp_sum(top);
  return within == k ? top : multiply_add(static_cast<float>(k - within), patch_term(float_of(high), rate), top);
}

}  // namespace pyattr::cuda
