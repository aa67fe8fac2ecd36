// Subsampled randomised Hadamard transform: see hadamard_project.h for the matrix and the idea.
//
// A thread block owns one sample and a range of blocks of columns. It reads each element once, with its sign, into shared memory,
// transforms the block there, and adds each output's entry to the range's sums in the workspace, where every thread has outputs of
// its own: no atomics. reduce_kernel adds the ranges.
//
// Order of summation, the same for any device, batch and repetition: butterflies from the widest distance to the narrowest, the blocks
// of a range in turn, the ranges in turn. It depends on (P, D) alone.
// Extra memory: 8 D bytes, and ranges * samples * D * 4 bytes of sums, at most 64 MiB or one sample's; ranges * D is at most
// 2^20, or D.
#include "hadamard_project.h"

#include "cuda/hadamard_limits.cuh"
#include "cuda/project_launch.cuh"

namespace pyattr::cuda {
namespace {

constexpr const char* kOp = "hadamard_project";
constexpr int kRadix = 8;

struct RowsTask {
  int64_t* rows;  // [count]
  int64_t count;
  int bits;
  uint32_t seed, stream;
};

struct HadamardTask {
  const unsigned char* grads;  // [num_samples, num_columns], the first sample of this launch
  int64_t num_samples, num_columns;
  int64_t sample_stride, column_stride;  // elements
  int bits;                              // of a block
  int64_t num_blocks, range_blocks;
  const int64_t* rows;  // [num_rows]
  int64_t num_rows;
  float* partial;  // [ranges, num_samples, num_rows]
  uint32_t seed, stream;
};

// Where entry i of a block lies: a word is left free after every 32, so that lanes 8 entries apart use different banks.
__device__ __forceinline__ int place(int i) { return i + i / 32; }

__device__ __forceinline__ uint32_t parity(uint32_t x) {
  x ^= x >> 16;
  x ^= x >> 8;
  x ^= x >> 4;
  return 0x6996u >> (x & 15) & 1;
}

__device__ __forceinline__ float float_from(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static __global__ void rows_kernel(const RowsTask task) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j < task.count) task.rows[j] = permute_bits(j, task.bits, task.seed, task.stream);
}

// The butterflies of R entries `stride` apart, for every such group of a block of 2^bits entries.
template <int R>
__device__ __forceinline__ void pass(float* x, int bits, int stride) {
  for (int group = threadIdx.x; group < (1 << bits) / R; group += kThreads) {
    const int first = group / stride * (R * stride) + group % stride;
    float v[R];
#pragma unroll
    for (int r = 0; r < R; ++r) v[r] = x[place(first + r * stride)];
#pragma unroll
    for (int distance = R / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r & distance) continue;
        const float a = v[r], b = v[r + distance];
        v[r] = a + b;
        v[r + distance] = a - b;
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) x[place(first + r * stride)] = v[r];
  }
  barrier();
}

__device__ __forceinline__ void transform(float* x, int bits) {
  int left = bits;
  if (left % 3 == 1) pass<2>(x, bits, 1 << (left - 1));
  if (left % 3 == 2) pass<4>(x, bits, 1 << (left - 2));
  for (left -= left % 3; left > 0; left -= 3) pass<kRadix>(x, bits, 1 << (left - 3));
}

template <class Element>
__global__ void __launch_bounds__(kThreads) hadamard_project_kernel(const HadamardTask task) {
  using Word = std::conditional_t<Element::kBytes == 4, uint32_t, uint16_t>;
  const int width = 1 << task.bits;
  float* const x = reinterpret_cast<float*>(dynamic_shared());               // [place(width)]
  uint32_t* const signs = reinterpret_cast<uint32_t*>(x + place(width));     // [width / 32], 1 is +1
  const int64_t sample = blockIdx.x % task.num_samples, range = blockIdx.x / task.num_samples;
  const unsigned char* const row = task.grads + sample * task.sample_stride * Element::kBytes;
  float* const sums = task.partial + (range * task.num_samples + sample) * task.num_rows;  // [num_rows]
  const int64_t begin = range * task.range_blocks;
  const int64_t end = begin + task.range_blocks < task.num_blocks ? begin + task.range_blocks : task.num_blocks;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * width;
    for (int call = threadIdx.x; call < width / kSignsPerCall; call += kThreads) {
      const uint32_t counter = static_cast<uint32_t>(first / kSignsPerCall + call);
      const PhiloxBlock words = pyattr::philox4x32_10(counter, 0, task.seed, task.stream, kHadamardSignWord);
      for (int w = 0; w < 4; ++w) signs[4 * call + w] = words.word[w];
    }
    barrier();
    for (int i = threadIdx.x; i < width; i += kThreads) {
      float value = 0.0f;
      if (first + i < task.num_columns) {
        const uint32_t bits = Element::bits(load_global<Word>(row + (first + i) * task.column_stride * Element::kBytes));
        value = float_from(bits ^ (~signs[i / 32] >> (i % 32) & 1) << 31);
      }
      x[place(i)] = value;
    }
    barrier();
    transform(x, task.bits);
    for (int64_t j = threadIdx.x; j < task.num_rows; j += kThreads) {
      const int64_t hadamard_row = task.rows[j];
      const float entry = x[place(static_cast<int>(hadamard_row & (width - 1)))];
      const float term = parity(static_cast<uint32_t>((hadamard_row >> task.bits) & block)) ? -entry : entry;
      sums[j] = block == begin ? term : sums[j] + term;
    }
    barrier();
  }
}

// How the columns are split: part of the order of summation, hence a function of (P, D) alone.
struct HadamardPlan {
  int bits = kHadamardFewestBits;
  int64_t num_blocks = 0, range_blocks = 1, num_ranges = 0;
  int64_t launch_samples = 1;
};

HadamardPlan plan_hadamard(const ProjectArgs& args) {
  HadamardPlan plan;
  plan.bits = std::clamp(hadamard_bits(args.proj_dim) + 1, kHadamardFewestBits, kHadamardMostBits);
  const int64_t width = int64_t{1} << plan.bits;
  plan.num_blocks = (args.num_columns + width - 1) / width;
  const int64_t wanted = std::clamp(kHadamardRangeRows / std::max<int64_t>(args.proj_dim, 1), int64_t{1}, kHadamardMaxRanges);
  plan.range_blocks = std::max<int64_t>((plan.num_blocks + wanted - 1) / wanted, 1);
  plan.num_ranges = (plan.num_blocks + plan.range_blocks - 1) / plan.range_blocks;
  const int64_t sums = std::max<int64_t>(plan.num_ranges * args.proj_dim, 1);
  plan.launch_samples = std::clamp(kHadamardPartials / sums, int64_t{1}, std::max<int64_t>(args.num_samples, 1));
  return plan;
}

template <class Element>
void run(const ProjectArgs& args, void* workspace, cudaStream_t stream) {
  if (args.num_samples == 0 || args.proj_dim == 0) return;
  const HadamardPlan plan = plan_hadamard(args);
  const auto blocks_of = [](int64_t count) { return dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)); };
  int64_t* const rows = static_cast<int64_t*>(workspace);
  float* const partial = reinterpret_cast<float*>(rows + args.proj_dim);
  RowsTask rows_task{rows, args.proj_dim, hadamard_bits(args.num_columns), args.seed, args.stream};
  void* rows_arguments[] = {&rows_task};
  check(cudaLaunchKernel(rows_kernel, blocks_of(args.proj_dim), dim3(kThreads), rows_arguments, 0, stream), kOp,
        "launching the permutation");
  const int width = 1 << plan.bits;
  const size_t shared = static_cast<size_t>(width + width / 32 + width / 32) * sizeof(float);
  for (int64_t sample = 0; sample < args.num_samples; sample += plan.launch_samples) {
    const int64_t samples = std::min(plan.launch_samples, args.num_samples - sample);
    HadamardTask task{static_cast<const unsigned char*>(args.grads) + sample * args.sample_stride * Element::kBytes,
                      samples, args.num_columns, args.sample_stride, args.column_stride, plan.bits, plan.num_blocks,
                      plan.range_blocks, rows, args.proj_dim, partial, args.seed, args.stream};
    void* arguments[] = {&task};
    if (plan.num_ranges > 0) {
      const dim3 grid(static_cast<unsigned>(plan.num_ranges * samples));
      check(cudaLaunchKernel(hadamard_project_kernel<Element>, grid, dim3(kThreads), arguments, shared, stream), kOp,
            "launching the kernel");
    }
    ReduceTask reduce{partial, plan.num_ranges, samples, args.proj_dim, args.out + sample * args.proj_dim, args.proj_dim, args.scale};
    void* reduce_arguments[] = {&reduce};
    check(cudaLaunchKernel(reduce_kernel, blocks_of(samples * args.proj_dim), dim3(kThreads), reduce_arguments, 0, stream), kOp,
          "launching the reduction");
  }
}

}  // namespace

size_t hadamard_project_workspace(const ProjectArgs& args) {
  const HadamardPlan plan = plan_hadamard(args);
  const size_t sums = static_cast<size_t>(plan.num_ranges * plan.launch_samples * args.proj_dim);
  return static_cast<size_t>(args.proj_dim) * sizeof(int64_t) + sums * sizeof(float);
}

void hadamard_project(const ProjectArgs& args, void* workspace, CUstream_st* stream) {
  switch (args.dtype) {
    case Dtype::float16: return run<Float16InBFloat16>(args, workspace, stream);
    case Dtype::bfloat16: return run<BFloat16>(args, workspace, stream);
    case Dtype::float32: return run<Float32>(args, workspace, stream);
  }
}

}  // namespace pyattr::cuda
