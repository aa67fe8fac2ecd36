// One task of group_norm_silu_jvp, included by one file per SIMD level and compiled with that level's flags. Everything has
// internal linkage, so that no other file links this code.
//
// A group's xhat and slope = silu'(z) weight / sqrt(var + eps) are computed once and stay in the cache; then each tangent is read
// twice, the second time from the cache, and its derivative written.
//
// Sums, the same at every level: element i goes to lane i mod 32 in float32, the lanes of each 512 elements join float64 lanes,
// which are halved until one is left. The primal's statistics are float64 throughout, in 32 lanes, the variance about the mean: a
// constant group has xhat = 0 exactly.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/half_precision.h"
#include "cpu/buffer.h"
#include "cpu/group_norm_task.h"
#include "cpu/registers.h"
#include "cpu/stage.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyattr::cpu {
namespace {

constexpr int64_t kStep = 32;            // elements added to the lanes at a time
constexpr int64_t kStepsOfRun = 16;      // in float32
constexpr int64_t kTilePositions = 16;   // of channels-last rows that stay in the first-level cache
constexpr int kWide = kRegisterLanes;    // lanes of a register
constexpr int kHalf = kRegisterLanes / 2;
constexpr int kParts = kStep / kWide, kHalves = kStep / kHalf;
typedef float reg __attribute__((vector_size(4 * kWide)));
typedef int32_t ireg __attribute__((vector_size(4 * kWide)));
typedef uint32_t ureg __attribute__((vector_size(4 * kWide)));
typedef float half_reg __attribute__((vector_size(4 * kHalf)));
typedef double wide_reg __attribute__((vector_size(8 * kHalf)));

template <class R, class T>
inline R load(const T* from) {
  R value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class R, class T>
inline void store(T* to, R value) {
  std::memcpy(to, &value, sizeof value);
}

// To an address aligned to the register, past the caches where the processor can.
inline void store_past_cache(float* to, reg value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)value);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)value);
#elif defined(__SSE2__)
  _mm_stream_ps(to, (__m128)value);
#else
  store(to, value);
#endif
}

inline void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline wide_reg load_wide(const float* from) {
#if defined(__AVX512F__)
  return (wide_reg)_mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif defined(__AVX2__)
  return (wide_reg)_mm256_cvtps_pd(_mm_loadu_ps(from));  // which GCC 12 makes of two halves
#else
  return __builtin_convertvector(load<half_reg>(from), wide_reg);
#endif
}

struct Lanes {
  double lane[kStep] = {};

  inline void add(const reg* sums) {  // kParts of them
    float spilled[kStep];
    std::memcpy(spilled, sums, sizeof spilled);
    for (int h = 0; h < kHalves; ++h) store(lane + h * kHalf, load<wide_reg>(lane + h * kHalf) + load_wide(spilled + h * kHalf));
  }

  inline double total() {
    for (int width = kStep / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    }
    return lane[0];
  }
};

inline reg select(ireg mask, reg a, reg b) { return (reg)(((ireg)a & mask) | ((ireg)b & ~mask)); }

// exp(x) for x <= 0, 0 below -87, NaN for NaN: x = n ln 2 + r, |r| <= ln(2) / 2 + 2^-18, and Taylor's polynomial of degree 7, whose
// remainder is below 6e-9; in all at most 2 units in the last place.
inline reg exp_negative(reg x) {
  const reg shift = reg{} + 0x1.8p23f, shifted = x * 0x1.715476p+0f + shift;  // whose last bits are n
  const reg n = shifted - shift;
  const reg r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // n * the first part is exact
  reg p = r * 1.984127e-4f + 1.3888889e-3f;
  p = p * r + 8.3333338e-3f;
  p = p * r + 4.1666668e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  const reg power = (reg)(((ureg)shifted << 23) + 0x3F800000u);
  return (reg)((ireg)(p * power) & ~(ireg)(x < -87.0f));
}

// z sigma(z) and its derivative sigma(z) (1 + z (1 - sigma(z))).
inline void silu_and_slope(reg z, reg* y, reg* slope) {
  const reg e = exp_negative((reg)((ireg)z | INT32_MIN)), larger = 1.0f / (1.0f + e), smaller = e * larger;
  const ireg negative = z < 0.0f;
  const reg sigma = select(negative, smaller, larger), rest = select(negative, larger, smaller);
  *y = z * sigma;
  *slope = sigma * (1.0f + z * rest);
}

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < 4, or added to it.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride, bool add) {
  typedef float four __attribute__((vector_size(16)));
  four row[4];
  for (int i = 0; i < 4; ++i) row[i] = load<four>(from + i * from_stride);
  typedef int32_t places __attribute__((vector_size(16)));
  constexpr places kLow{0, 4, 1, 5}, kHigh{2, 6, 3, 7}, kFirst{0, 1, 4, 5}, kSecond{2, 3, 6, 7};
  const four low_01 = __builtin_shuffle(row[0], row[1], kLow), high_01 = __builtin_shuffle(row[0], row[1], kHigh);
  const four low_23 = __builtin_shuffle(row[2], row[3], kLow), high_23 = __builtin_shuffle(row[2], row[3], kHigh);
  const four column[4] = {__builtin_shuffle(low_01, low_23, kFirst), __builtin_shuffle(low_01, low_23, kSecond),
                          __builtin_shuffle(high_01, high_23, kFirst), __builtin_shuffle(high_01, high_23, kSecond)};
  for (int j = 0; j < 4; ++j) {
    float* const out = to + j * to_stride;
    store(out, add ? load<four>(out) + column[j] : column[j]);
  }
}

// Channels and positions that transpose() takes: of float32 whose channels lie side by side.
struct Turned {
  int64_t channels = 0, positions = 0;
};
template <class T>
Turned turned(const TangentArray& array, int64_t channels, int64_t L) {
  if (!std::is_same_v<T, float> || array.channel_stride != 1) return {};
  return {channels / 4 * 4, L / 4 * 4};
}

// Calls one(c, l) for every channel and position but those below `done`, some positions of all channels after one another.
template <class One>
void each_but(const Turned& done, int64_t channels, int64_t L, One one) {
  for (int64_t first = 0; first < L; first += kTilePositions) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t l = c < done.channels ? std::max(first, done.positions) : first; l < std::min(L, first + kTilePositions); ++l) one(c, l);
    }
  }
}

// to[c * L + l] = from[c, l] (+ also[c, l]), widened.
template <class T, class Widen>
void gather_as(const TangentArray& from, int64_t offset, const TangentArray& also, int64_t also_offset, int64_t channels, int64_t L,
               Widen widen_one, float* to) {
  const auto copy = [&](const TangentArray& array, int64_t first, bool add, auto put) {
    const T* const data = static_cast<const T*>(array.data) + first;
    if (array.position_stride == 1) {
      for (int64_t c = 0; c < channels; ++c) {
        const T* const row = data + c * array.channel_stride;
        float* const out = to + c * L;
        for (int64_t l = 0; l < L; ++l) put(out[l], widen_one(row[l]));
      }
      return;
    }
    const Turned done = turned<T>(array, channels, L);
    if constexpr (std::is_same_v<T, float>) {  // whole cache lines of four channels at a time
      for (int64_t tile = 0; tile < done.positions; tile += kTilePositions) {
        for (int64_t c = 0; c < done.channels; c += 4) {
          for (int64_t l = tile; l < std::min(done.positions, tile + kTilePositions); l += 4)
            transpose(data + c + l * array.position_stride, array.position_stride, to + c * L + l, L, add);
        }
      }
    }
    each_but(done, channels, L,
             [&](int64_t c, int64_t l) { put(to[c * L + l], widen_one(data[c * array.channel_stride + l * array.position_stride])); });
  };
  copy(from, offset, false, [](float& out, float value) { out = value; });
  if (also.data != nullptr) copy(also, also_offset, true, [](float& out, float value) { out += value; });
}

template <class T, class Narrow>
void scatter_as(const float* from, const TangentArray& to, int64_t offset, int64_t channels, int64_t L, Narrow narrow_one) {
  T* const data = static_cast<T*>(to.data) + offset;
  if (to.position_stride == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      T* const row = data + c * to.channel_stride;
      for (int64_t l = 0; l < L; ++l) row[l] = narrow_one(from[c * L + l]);
    }
    return;
  }
  const Turned done = turned<T>(to, channels, L);
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t l = 0; l < done.positions; l += 4) {
      for (int64_t c = 0; c < done.channels; c += 4)
        transpose(from + c * L + l, L, data + c + l * to.position_stride, to.position_stride, false);
    }
  }
  each_but(done, channels, L,
           [&](int64_t c, int64_t l) { data[c * to.channel_stride + l * to.position_stride] = narrow_one(from[c * L + l]); });
}

// A group's elements of an array of one tangent, or of the primal with tangent 0.
struct Slab {
  const GroupNormSiluJvpArgs& args;
  int64_t sample, group;

  int64_t channels() const { return args.group_channels(); }
  int64_t offset(const TangentArray& array, int64_t tangent) const {
    return tangent * array.tangent_stride + sample * array.sample_stride + group * channels() * array.channel_stride;
  }
  // Its address where it is n float32 in a row, otherwise null.
  float* direct(const TangentArray& array, int64_t tangent) const {
    const bool plain = (array.position_stride == 1 || args.num_positions == 1) &&
                       (array.channel_stride == args.num_positions || channels() == 1);
    return plain && args.dtype == Dtype::float32 ? static_cast<float*>(array.data) + offset(array, tangent) : nullptr;
  }
  void gather(const TangentArray& from, const TangentArray& also, int64_t tangent, float* to) const {
    const auto as = [&](auto zero, auto widen_one) {
      gather_as<decltype(zero)>(from, offset(from, tangent), also, offset(also, tangent), channels(), args.num_positions, widen_one,
                                to);
    };
    if (args.dtype == Dtype::float32) as(0.0f, [](float x) { return x; });
    if (args.dtype == Dtype::bfloat16) as(uint16_t{0}, [](uint16_t x) { return widen_bfloat16(x); });
    if (args.dtype == Dtype::float16) as(uint16_t{0}, [](uint16_t x) { return widen_float16(x); });
  }
  void scatter(const float* from, const TangentArray& to, int64_t tangent) const {
    const auto as = [&](auto zero, auto narrow_one) {
      scatter_as<decltype(zero)>(from, to, offset(to, tangent), channels(), args.num_positions, narrow_one);
    };
    if (args.dtype == Dtype::float32) as(0.0f, [](float x) { return x; });
    if (args.dtype == Dtype::bfloat16) as(uint16_t{0}, [](float x) { return narrow_bfloat16(x); });
    if (args.dtype == Dtype::float16) as(uint16_t{0}, [](float x) { return narrow_float16(x); });
  }
};

// xhat [padded] in place of s, slope [padded] and y [padded] of one group of n elements, zeros beyond them in xhat.
void normalise(const Slab& slab, int64_t n, int64_t padded, float* s, float* slope, float* y) {
  const GroupNormSiluJvpArgs& args = slab.args;
  const int64_t whole = n / kStep * kStep;
  const auto sum = [&](auto term) {
    wide_reg sums[kHalves] = {};
    for (int64_t i = 0; i < whole; i += kStep) {
#pragma GCC unroll 16
      for (int h = 0; h < kHalves; ++h) sums[h] += term(load_wide(s + i + h * kHalf));
    }
    Lanes lanes;
    std::memcpy(lanes.lane, sums, sizeof sums);
    for (int64_t i = whole; i < n; ++i) lanes.lane[i - whole] += term(static_cast<double>(s[i]));
    return lanes.total();
  };
  const double mean = sum([](auto v) { return v; }) / static_cast<double>(n);
  const double variance = sum([&](auto v) { return (v - mean) * (v - mean); }) / static_cast<double>(n);
  const double inverse = 1.0 / std::sqrt(variance + args.eps);
  std::fill(s + n, s + padded, 0.0f);
  for (int64_t i = 0; i < padded; i += kHalf) {
    store(s + i, __builtin_convertvector((load_wide(s + i) - mean) * inverse, half_reg));
  }
  std::fill(s + n, s + padded, 0.0f);

  const int64_t L = args.num_positions, first = slab.group * slab.channels();
  for (int64_t c = 0; c < slab.channels(); ++c) {
    std::fill(slope + c * L, slope + (c + 1) * L, args.weight == nullptr ? 1.0f : args.weight[first + c]);
    std::fill(y + c * L, y + (c + 1) * L, args.bias == nullptr ? 0.0f : args.bias[first + c]);
  }
  std::fill(slope + n, slope + padded, 0.0f);
  std::fill(y + n, y + padded, 0.0f);
  const float scale = static_cast<float>(inverse);
  for (int64_t i = 0; i < padded; i += kWide) {
    const reg weight = load<reg>(slope + i), z = load<reg>(s + i) * weight + load<reg>(y + i);
    reg result = z, along = reg{} + 1.0f;
    if (args.silu) silu_and_slope(z, &result, &along);
    store(y + i, result);
    store(slope + i, along * weight * scale);
  }
}

// to[i] = slope[i] * (t[i] - mean t - xhat[i] * mean(xhat t)) for i < n; t may be to. Touches what is read next.
template <bool past_cache>
void differentiate(const float* t, const float* xhat, const float* slope, int64_t n, const float* next, float* to) {
  float rest[kStep] = {};
  const int64_t whole = n / kStep * kStep;
  std::memcpy(rest, t + whole, static_cast<size_t>(n - whole) * sizeof(float));
  Lanes plain, along;
  for (int64_t run = 0; run < n; run += kStep * kStepsOfRun) {
    reg sum[kParts] = {}, sum_along[kParts] = {};
    const auto add = [&](const float* from, const float* with) {
#pragma GCC unroll 8
      for (int r = 0; r < kParts; ++r) {
        const reg v = load<reg>(from + r * kWide);
        sum[r] += v;
        sum_along[r] += v * load<reg>(with + r * kWide);
      }
    };
    const int64_t end = std::min(n, run + kStep * kStepsOfRun), last = std::min(whole, end);
    for (int64_t i = run; i < last; i += kStep) add(t + i, xhat + i);
    if (last < end) add(rest, xhat + whole);
    plain.add(sum);
    along.add(sum_along);
  }
  const float mean = static_cast<float>(plain.total() / static_cast<double>(n));
  const float mean_along = static_cast<float>(along.total() / static_cast<double>(n));
  const auto put = [&](const float* from, int64_t i, float* out, auto store_one) {
#pragma GCC unroll 8
    for (int r = 0; r < kParts; ++r) {
      const int64_t at = i + r * kWide;
      const reg value = load<reg>(slope + at) * ((load<reg>(from + r * kWide) - mean) - load<reg>(xhat + at) * mean_along);
      store_one(out + r * kWide, value);
    }
  };
  for (int64_t i = 0; i < whole; i += kStep) {
    __builtin_prefetch(next + i);
    __builtin_prefetch(next + i + 16);
    put(t + i, i, to + i, past_cache ? store_past_cache : store<reg, float>);
  }
  if (whole < n) {
    put(rest, whole, rest, store<reg, float>);
    std::memcpy(to + whole, rest, static_cast<size_t>(n - whole) * sizeof(float));
  }
}

void group_norm_task(const GroupNormTask& task) {
  const GroupNormSiluJvpArgs& args = *task.args;
  const int64_t n = args.group_size(), padded = (n + kStep - 1) / kStep * kStep, groups = task.group_end - task.group_begin;
  auto normal = aligned_array<float>(groups * padded), slopes = aligned_array<float>(groups * padded);
  auto scratch = aligned_array<float>(padded);
  const auto slab_of = [&](int64_t g) { return Slab{args, task.sample, task.group_begin + g}; };
  for (int64_t g = 0; g < groups; ++g) {
    const Slab slab = slab_of(g);
    float* const xhat = normal.get() + g * padded;
    slab.gather(args.x, args.residual, 0, xhat);
    if (task.primal && args.sum.data != nullptr) slab.scatter(xhat, args.sum, 0);
    normalise(slab, n, padded, xhat, slopes.get() + g * padded, scratch.get());
    if (task.primal) slab.scatter(scratch.get(), args.y, 0);
  }
  for (int64_t k = task.tangent_begin; k < task.tangent_end; ++k) {
    for (int64_t g = 0; g < groups; ++g) {
      const Slab slab = slab_of(g);
      const float* from = args.residual_dot.data == nullptr ? slab.direct(args.x_dot, k) : nullptr;
      const float* const next = from != nullptr && k + 1 < task.tangent_end ? slab.direct(args.x_dot, k + 1) : scratch.get();
      if (from == nullptr) {
        slab.gather(args.x_dot, args.residual_dot, k, scratch.get());
        if (args.sum_dot.data != nullptr) slab.scatter(scratch.get(), args.sum_dot, k);
        from = scratch.get();
      }
      float* const straight = slab.direct(args.y_dot, k);
      float* const to = straight != nullptr ? straight : scratch.get();
      const bool past_cache = task.past_cache && reinterpret_cast<uintptr_t>(straight) % sizeof(reg) == 0 && straight != nullptr;
      const auto kernel = past_cache ? differentiate<true> : differentiate<false>;
      kernel(from, normal.get() + g * padded, slopes.get() + g * padded, n, next, to);
      if (straight == nullptr) slab.scatter(to, args.y_dot, k);
    }
  }
  if (task.past_cache) finish_stores();
}

}  // namespace
}  // namespace pyattr::cpu
