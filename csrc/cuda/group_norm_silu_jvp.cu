// Group normalisation with SiLU and K tangents on CUDA cores: see group_norm_silu_jvp.h for what is computed.
//
// A thread block owns a group of one sample and some of its tangents. A group of at most 8192 elements stays in registers, xhat
// and slope = silu'(z) weight / sqrt(var + eps); each tangent is then read once and its derivative written. A larger group is read
// again for every tangent, and each tangent twice: from L2, where a group's few hundred KB stay.
//
// Error. Threads add their own n / threads elements in float32, lanes join them as a tree, warps one after the other: sums are
// within (n / threads + 21) 2^-24 of the sum of magnitudes. The mean is taken twice, the second time of what the first left, so
// that a large common offset costs the variance no digits. Each tangent is summed by itself: no bits depend on K, B or on how
// blocks share them.
#include "group_norm_silu_jvp.h"

#include <algorithm>
#include <cmath>

#include "common/half_precision.h"
#include "cuda/group_norm_limits.cuh"
#include "cuda/reduce.cuh"

namespace pyattr::cuda {
namespace {

constexpr const char* kGroupNormOp = "group_norm_silu_jvp";
constexpr int kWarpLanes = 32;
constexpr int kFewThreads = 256, kManyThreads = 512;  // of a block
constexpr int kFewElements = 4, kManyElements = 16;   // of a thread that holds its elements

struct GroupNormWork {
  GroupNormSiluJvpArgs args;
  int64_t channels, size;  // of a group
  int64_t share;          // tangents of an item
  int64_t items;          // (part of the tangents, sample, group), groups fastest
  bool channels_fastest;  // order of a group's elements
};

// Element i of a group, as two coordinates that are advanced without a division.
struct Place {
  int64_t fast, slow;
};

template <Dtype dtype>
__device__ __forceinline__ float load_element(const TangentArray& array, int64_t offset) {
  if constexpr (dtype == Dtype::float32) {
    return load_global<float>(static_cast<const float*>(array.data) + offset);
  } else {
    const uint32_t bits = load_global<uint16_t>(static_cast<const uint16_t*>(array.data) + offset);
    return float_of_bits(dtype == Dtype::bfloat16 ? bits << 16 : half_to_float_bits(bits));
  }
}

template <Dtype dtype>
__device__ __forceinline__ void store_element(const TangentArray& array, int64_t offset, float value) {
  if constexpr (dtype == Dtype::float32) {
    static_cast<float*>(array.data)[offset] = value;
  } else {
    static_cast<uint16_t*>(array.data)[offset] = dtype == Dtype::bfloat16 ? narrow_bfloat16(value) : narrow_float16(value);
  }
}

struct Pair {
  float a, b;
};

// Sums over the block. `scratch` is not touched again before the barrier of the next call but one.
__device__ __forceinline__ Pair block_sum(Pair value, float* scratch) {
  for (int mask = kWarpLanes / 2; mask > 0; mask /= 2) {
    value.a += float_of_bits(shuffle_xor(float_bits(value.a), mask));
    value.b += float_of_bits(shuffle_xor(float_bits(value.b), mask));
  }
  const int warps = static_cast<int>(blockDim.x) / kWarpLanes, warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  if (threadIdx.x % kWarpLanes == 0) scratch[2 * warp] = value.a, scratch[2 * warp + 1] = value.b;
  barrier();
  Pair total{0.0f, 0.0f};
  for (int w = 0; w < warps; ++w) total.a += scratch[2 * w], total.b += scratch[2 * w + 1];
  return total;
}

// One item. kHeld: elements that a thread keeps in registers, 0 for groups that do not fit.
template <Dtype dtype, int kHeld>
struct GroupNormItem {
  static constexpr int kSlots = kHeld == 0 ? 1 : kHeld;
  const GroupNormWork& work;
  const GroupNormSiluJvpArgs& args;
  int64_t sample, group;
  float mean = 0.0f, rest = 0.0f, inverse = 0.0f;
  float xhat[kSlots], slope[kSlots], held[kSlots];

  __device__ __forceinline__ GroupNormItem(const GroupNormWork& all, int64_t slab)
      : work(all), args(all.args), sample(slab / all.args.num_groups), group(slab % all.args.num_groups) {}

  __device__ __forceinline__ int64_t offset(const TangentArray& array, const Place& at) const {
    const int64_t fast = work.channels_fastest ? array.channel_stride : array.position_stride;
    const int64_t slow = work.channels_fastest ? array.position_stride : array.channel_stride;
    return sample * array.sample_stride + group * work.channels * array.channel_stride + at.fast * fast + at.slow * slow;
  }

  // use(slot, place) for each element of this thread.
  template <class Use>
  __device__ __forceinline__ void each(Use use) {
    const int64_t n = work.size, width = work.channels_fastest ? work.channels : args.num_positions;
    const Place step{static_cast<int64_t>(blockDim.x) % width, static_cast<int64_t>(blockDim.x) / width};
    Place at{static_cast<int64_t>(threadIdx.x) % width, static_cast<int64_t>(threadIdx.x) / width};
    const auto advance = [&] {
      at.fast += step.fast, at.slow += step.slow;
      if (at.fast >= width) at.fast -= width, ++at.slow;
    };
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int slot = 0; slot < kHeld; ++slot, advance()) {
        if (threadIdx.x + slot * static_cast<int64_t>(blockDim.x) < n) use(slot, at);
      }
    } else {
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x, advance()) use(0, at);
    }
  }

  __device__ __forceinline__ float load_sum(const TangentArray& a, const TangentArray& b, int64_t tangent, const Place& at) const {
    const float value = load_element<dtype>(a, tangent * a.tangent_stride + offset(a, at));
    return b.data == nullptr ? value : value + load_element<dtype>(b, tangent * b.tangent_stride + offset(b, at));
  }

  // From s, in registers or read again.
  __device__ __forceinline__ float centred(int slot, const Place& at) const {
    return (kHeld > 0 ? held[slot] : load_sum(args.x, args.residual, 0, at)) - mean;
  }

  __device__ __forceinline__ float normal(int slot, const Place& at) const {
    return kHeld > 0 ? xhat[slot] : (centred(slot, at) - rest) * inverse;
  }

  // y, and what (s_dot - its means) is multiplied by.
  __device__ __forceinline__ Pair activate(float normal_value, const Place& at) const {
    const int64_t channel = group * work.channels + (work.channels_fastest ? at.fast : at.slow);
    const float weight = args.weight == nullptr ? 1.0f : args.weight[channel];
    const float z = normal_value * weight + (args.bias == nullptr ? 0.0f : args.bias[channel]);
    if (!args.silu) return {z, weight * inverse};
    const float share = 1.0f / (1.0f + expf(-z));
    return {z * share, share * (1.0f + z * (1.0f - share)) * weight * inverse};
  }

  __device__ __forceinline__ void primal(float* scratch, int scratch_floats, bool write) {
    const float n = static_cast<float>(work.size);
    Pair sum{0.0f, 0.0f};
    each([&](int slot, const Place& at) {
      held[slot] = load_sum(args.x, args.residual, 0, at);
      sum.a += held[slot];
    });
    mean = block_sum(sum, scratch).a / n;
    sum = {0.0f, 0.0f};
    each([&](int slot, const Place& at) {
      const float c = centred(slot, at);
      sum.a += c;
      sum.b += c * c;
    });
    sum = block_sum(sum, scratch + scratch_floats);
    rest = sum.a / n;
    const float variance = sum.b / n - rest * rest;
    inverse = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + static_cast<float>(args.eps));
    if (kHeld == 0 && !write) return;
    each([&](int slot, const Place& at) {
      const float c = centred(slot, at);
      xhat[slot] = (c - rest) * inverse;
      const Pair both = activate(xhat[slot], at);
      slope[slot] = both.b;
      if (!write) return;
      store_element<dtype>(args.y, offset(args.y, at), both.a);
      if (args.sum.data == nullptr) return;
      const float s = kHeld > 0 ? held[slot] : load_sum(args.x, args.residual, 0, at);
      store_element<dtype>(args.sum, offset(args.sum, at), s);
    });
  }

  __device__ __forceinline__ void tangent(int64_t k, float* scratch) {
    const float n = static_cast<float>(work.size);
    Pair sum{0.0f, 0.0f};
    each([&](int slot, const Place& at) {
      const float t = load_sum(args.x_dot, args.residual_dot, k, at);
      held[slot] = t;
      sum.a += t;
      sum.b += normal(slot, at) * t;
    });
    sum = block_sum(sum, scratch);
    const float t_mean = sum.a / n, along = sum.b / n;
    each([&](int slot, const Place& at) {
      const float t = kHeld > 0 ? held[slot] : load_sum(args.x_dot, args.residual_dot, k, at);
      const float unit = normal(slot, at), factor = kHeld > 0 ? slope[slot] : activate(unit, at).b;
      const float value = factor * ((t - t_mean) - unit * along);
      store_element<dtype>(args.y_dot, k * args.y_dot.tangent_stride + offset(args.y_dot, at), value);
      if (args.sum_dot.data != nullptr) {
        store_element<dtype>(args.sum_dot, k * args.sum_dot.tangent_stride + offset(args.sum_dot, at), t);
      }
    });
  }
};

template <Dtype dtype, int kHeld>
__global__ void __launch_bounds__(kManyThreads) group_norm_silu_jvp_kernel(const GroupNormWork work) {
  const GroupNormSiluJvpArgs& args = work.args;
  const int scratch_floats = 2 * static_cast<int>(blockDim.x) / kWarpLanes;
  float* const scratch = reinterpret_cast<float*>(dynamic_shared());  // [2, scratch_floats], used in turn
  for (int64_t item = blockIdx.x; item < work.items; item += gridDim.x) {
    const int64_t slab = item % (args.num_samples * args.num_groups), part = item / (args.num_samples * args.num_groups);
    GroupNormItem<dtype, kHeld> one(work, slab);
    one.primal(scratch, scratch_floats, part == 0);
    const int64_t begin = part * work.share;
    const int64_t end = begin + work.share < args.num_tangents ? begin + work.share : args.num_tangents;
    for (int64_t k = begin; k < end; ++k) one.tangent(k, scratch + (k - begin) % 2 * scratch_floats);
    barrier();  // before the next item takes the first half of the scratch
  }
}

template <Dtype dtype>
void launch_group_norm(GroupNormWork work, cudaStream_t stream) {
  const int64_t n = work.size;
  auto kernel = group_norm_silu_jvp_kernel<dtype, 0>;
  if (n <= kManyElements * kManyThreads) kernel = group_norm_silu_jvp_kernel<dtype, kManyElements>;
  if (n <= kFewElements * kFewThreads) kernel = group_norm_silu_jvp_kernel<dtype, kFewElements>;
  const int threads = n <= kManyElements * kFewThreads ? kFewThreads : kManyThreads;
  void* arguments[] = {&work};
  const dim3 grid(static_cast<unsigned>(std::min(work.items, kGroupNormMostBlocks)));
  const size_t shared = 4 * static_cast<size_t>(threads / kWarpLanes) * sizeof(float);
  check(cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), arguments, shared, stream), kGroupNormOp,
        "launching the kernel");
}

}  // namespace

void group_norm_silu_jvp(const GroupNormSiluJvpArgs& args, CUstream_st* stream) {
  const int64_t slabs = args.num_samples * args.num_groups, K = args.num_tangents;
  if (slabs == 0 || args.group_size() == 0) return;
  const int64_t share = std::max<int64_t>(K * slabs / kGroupNormBlocksWanted, 1);
  GroupNormWork work{args, args.group_channels(), args.group_size(), share, 0, false};
  work.items = slabs * std::max<int64_t>((K + work.share - 1) / work.share, 1);
  work.channels_fastest = args.x_dot.position_stride != 1 && args.x_dot.channel_stride == 1;
  if (args.dtype == Dtype::float32) launch_group_norm<Dtype::float32>(work, stream);
  if (args.dtype == Dtype::bfloat16) launch_group_norm<Dtype::bfloat16>(work, stream);
  if (args.dtype == Dtype::float16) launch_group_norm<Dtype::float16>(work, stream);
}

}  // namespace pyattr::cuda
