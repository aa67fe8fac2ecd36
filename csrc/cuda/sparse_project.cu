// Sparse projection on CUDA cores: see sparse_project.h for the matrix, sketch_kernel.cuh for the algorithm.
#include "sparse_project.h"

#include <algorithm>
#include <utility>

#include "cuda/reduce.cuh"
#include "cuda/sketch_kernel.cuh"

namespace pyattr::cuda {
namespace {

constexpr const char* kSketchOp = "sparse_project";

// a^-1 mod size, for a prime to it; 0 where size is 1. Euclid: rest = coefficient * a mod size, likewise next.
uint32_t inverse_modulo(uint32_t a, int64_t size) {
  int64_t rest = size, next = a % size, coefficient = 0, next_coefficient = 1;
  while (next != 0) {
    const int64_t quotient = rest / next;
    rest = std::exchange(next, rest - quotient * next);
    coefficient = std::exchange(next_coefficient, coefficient - quotient * next_coefficient);
  }
  return static_cast<uint32_t>((coefficient + size) % size);
}

// How the columns are split: part of the order of summation, hence a function of (P, D) alone.
struct SketchRanges {
  int64_t columns, count;
};
SketchRanges plan_sketch(int64_t num_columns, int64_t proj_dim) {
  const int64_t wanted = std::clamp(kSketchRangeRows / proj_dim, int64_t{1}, kSketchMaxRanges);
  const int64_t columns = std::max((num_columns + wanted - 1) / wanted, kSketchRangeWidths * proj_dim);
  return {columns, std::max<int64_t>((num_columns + columns - 1) / columns, 1)};
}

// Samples of a launch. One range needs no workspace: its sums are the result.
int64_t launch_samples(const SketchRanges& ranges, int64_t proj_dim) {
  return ranges.count == 1 ? kSketchLaunchSamples
                           : std::min(kSketchLaunchOutputs / (ranges.count * proj_dim), kSketchLaunchSamples);
}

template <class Kernel>
void launch_kernel(Kernel kernel, const SketchTask& task, int64_t samples, int threads, size_t shared, cudaStream_t stream) {
  SketchTask copy = task;
  void* arguments[] = {&copy};
  const dim3 grid(static_cast<unsigned>(task.parts * (task.num_samples / samples) * task.num_ranges));
  check(cudaLaunchKernel(kernel, grid, dim3(threads), arguments, shared, stream), kSketchOp, "launching the kernel");
}

template <class Element, int kSamples, int kQuads>
void launch_blocks(SketchTask task, cudaStream_t stream) {
  const int64_t largest = task.smallest + (task.smallest * task.nonzeros < task.first[task.nonzeros]);
  const int64_t quads = task.nonzeros * ((largest + kQuadBlocks - 1) / kQuadBlocks);
  const int64_t warps = std::min<int64_t>((quads + kQuads - 1) / kQuads, kSketchWarps);
  task.parts = (quads + warps * kQuads - 1) / (warps * kQuads);
  launch_kernel(sketch_blocks_kernel<Element, kSamples, kQuads>, task, kSamples, static_cast<int>(32 * warps),
         warps * 32 * sizeof(SketchUnit), stream);
}

// kSamples samples for every thread; num_samples is a multiple of it.
template <class Element, int kSamples>
void launch_samples_of(SketchTask task, cudaStream_t stream) {
  if (task.lanes < 32) {
    task.parts = (task.proj_dim + kSketchThreads - 1) / kSketchThreads;
    launch_kernel(sketch_outputs_kernel<Element, kSamples>, task, kSamples, kSketchThreads, 0, stream);
  } else {
    launch_blocks<Element, kSamples, kSamples == 4 ? 4 : 2>(task, stream);
  }
}

template <class Element>
void sketch(const SketchArgs& args, float* workspace, cudaStream_t stream) {
  const SketchRanges ranges = plan_sketch(args.num_columns, args.proj_dim);
  SketchTask task{};
  task.num_columns = args.num_columns;
  task.sample_bytes = args.sample_stride * Element::kBytes;
  task.column_bytes = args.column_stride * Element::kBytes;
  task.column_offset = args.column_offset;
  task.range_columns = ranges.columns;
  task.num_ranges = ranges.count;
  task.proj_dim = args.proj_dim;
  task.scale = ranges.count == 1 ? args.scale : 1.0f;
  task.nonzeros = args.nonzeros;
  task.lanes = sketch_lanes(args.proj_dim, args.nonzeros);
  task.seed = args.seed;
  task.stream = args.stream;
  for (int r = 0; r < args.nonzeros; ++r) task.first[r] = sketch_group(args.proj_dim, args.nonzeros, r).first;
  task.first[args.nonzeros] = args.proj_dim / task.lanes;
  task.smallest = task.first[args.nonzeros] / args.nonzeros;
  for (int i = 0; i < kNumPrimes; ++i) {
    for (int more = 0; more < 2; ++more) task.inverse[more][i] = inverse_modulo(0u - kPrimeGaps[i], task.smallest + more);
  }

  // Where all outputs of 8 samples fit into the registers of one multiprocessor, 8 samples share the work on the matrix.
  // Where they do not, 4, so that the outputs at work at one time are twice as many: up to a million on a large card, which
  // then read the same part of G at about the same time and find it in L2.
  const int64_t most = task.lanes < 32 || args.proj_dim <= 8 * kSketchWarps * 32 ? 8 : 4;
  for (int64_t sample = 0; sample < args.num_samples;) {
    const int64_t left = std::min(args.num_samples - sample, launch_samples(ranges, args.proj_dim));
    int64_t together = most;
    while (together > left) together /= 2;
    task.num_samples = left / together * together;
    task.grads = static_cast<const unsigned char*>(args.grads) + sample * task.sample_bytes;
    float* const out = args.out + sample * args.proj_dim;
    task.sums = ranges.count == 1 ? out : workspace;
    switch (together) {
      case 8: launch_samples_of<Element, 8>(task, stream); break;
      case 4: launch_samples_of<Element, 4>(task, stream); break;
      case 2: launch_samples_of<Element, 2>(task, stream); break;
      default: launch_samples_of<Element, 1>(task, stream);
    }
    if (ranges.count > 1) {
      reduce_ranges(kSketchOp, {workspace, ranges.count, task.num_samples, args.proj_dim, out, args.proj_dim, args.scale}, stream);
    }
    sample += task.num_samples;
  }
}

}  // namespace

size_t sparse_project_workspace(const SketchArgs& args) {
  const SketchRanges ranges = plan_sketch(args.num_columns, args.proj_dim);
  if (ranges.count == 1) return 0;
  return static_cast<size_t>(ranges.count * std::min(args.num_samples, launch_samples(ranges, args.proj_dim)) * args.proj_dim) *
         sizeof(float);
}

void sparse_project(const SketchArgs& args, void* workspace, CUstream_st* stream) {
  switch (args.dtype) {
    case Dtype::float16: return sketch<SketchFloat16>(args, static_cast<float*>(workspace), stream);
    case Dtype::bfloat16: return sketch<SketchBFloat16>(args, static_cast<float*>(workspace), stream);
    case Dtype::float32: return sketch<SketchFloat32>(args, static_cast<float*>(workspace), stream);
  }
}

}  // namespace pyattr::cuda
