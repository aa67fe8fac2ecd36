// From ProjectArgs to launches: which kernel, how many thread blocks, how much scratch.
#pragma once

#include <algorithm>

#include "cuda/project_kernel.cuh"
#include "cuda/reduce.cuh"
#include "cuda/summation.cuh"

namespace pyattr::cuda {

// How the columns are split: part of the order of summation, hence a function of (P, column_offset, D) alone.
struct Ranges {
  int64_t first_block = 0, num_blocks = 0, range_blocks = 1, num_ranges = 0;
};

inline Ranges plan_ranges(int64_t num_columns, int64_t column_offset, int64_t proj_dim) {
  Ranges plan;
  if (num_columns == 0 || proj_dim == 0) return plan;
  plan.first_block = column_offset / kBlockColumns;
  plan.num_blocks = (column_offset + num_columns - 1) / kBlockColumns + 1 - plan.first_block;
  const int64_t rows = (std::min(proj_dim, kSlabRows) + kTileRows - 1) / kTileRows * kTileRows;
  const int64_t wanted = std::clamp(kRangeRows / rows, kMinRanges, kMaxRanges);
  plan.range_blocks = std::max((plan.num_blocks + wanted - 1) / wanted, kMinRangeBlocks);
  plan.num_ranges = (plan.num_blocks + plan.range_blocks - 1) / plan.range_blocks;
  return plan;
}

inline size_t workspace_bytes(const ProjectArgs& args) {
  const Ranges plan = plan_ranges(args.num_columns, args.column_offset, args.proj_dim);
  const int64_t outputs = std::min(args.num_samples, kLaunchSamples) * std::min(args.proj_dim, kSlabRows);
  return static_cast<size_t>(plan.num_ranges * outputs) * sizeof(float);
}

// The widest copy that every row of G, seen from the matrix's blocks of 128 columns, allows.
inline Copy plan_copy(const ProjectArgs& args, int element_bytes) {
  // The first block's column 0 lies column_offset mod 128 before grads; blocks then follow at multiples of 256 or 512
  // bytes.
  const int64_t start = static_cast<int64_t>(reinterpret_cast<uintptr_t>(args.grads)) -
                        args.column_offset % kBlockColumns * element_bytes;
  const int64_t row = args.num_samples > 1 ? args.sample_stride * element_bytes : 0;
  const auto aligned = [&](int64_t bytes) { return start % bytes == 0 && row % bytes == 0; };
  if (args.column_stride == 1 && aligned(16)) return Copy::kAsync16;
  if ((args.column_stride == 1 || element_bytes == 4) && aligned(4)) return Copy::kAsync4;
  return Copy::kElements;
}

template <class Matrix, class Element, int kSampleTiles>
void launch(const ProjectTask& task, int64_t num_ranges, cudaStream_t stream) {
  const auto kernel = project_kernel<Matrix, Element, kSampleTiles>;
  constexpr int kShared = SharedLayout<Element, 8 * kSampleTiles>::kTotal;
  const void* const address = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), Matrix::kOp,
        "reserving shared memory");
  ProjectTask copy = task;
  void* arguments[] = {&copy};
  const dim3 grid(static_cast<unsigned>(task.row_tiles * num_ranges));
  check(cudaLaunchKernel(kernel, grid, dim3(kThreads), arguments, kShared, stream), Matrix::kOp, "launching the kernel");
}

template <class Matrix, class Element>
void project(const ProjectArgs& args, void* workspace, cudaStream_t stream) {
  if (args.num_samples == 0 || args.proj_dim == 0) return;
  int device = 0, shared_limit = 0;
  check(cudaGetDevice(&device), Matrix::kOp, "asking for the device");
  check(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), Matrix::kOp,
        "asking for shared memory");
  const bool wide = SharedLayout<Element, 64>::kTotal <= shared_limit;
  const Ranges plan = plan_ranges(args.num_columns, args.column_offset, args.proj_dim);

  ProjectTask task{};
  task.copy = plan_copy(args, Element::kBytes);
  task.num_columns = args.num_columns;
  task.sample_stride = args.sample_stride;
  task.column_stride = args.column_stride;
  task.column_offset = args.column_offset;
  task.first_block = plan.first_block;
  task.num_blocks = plan.num_blocks;
  task.range_blocks = plan.range_blocks;
  task.partial = static_cast<float*>(workspace);
  task.keys = philox_keys(args.seed, args.stream);
  for (int64_t row = 0; row < args.proj_dim; row += kSlabRows) {
    task.first_row = row;
    task.num_rows = std::min(kSlabRows, args.proj_dim - row);
    task.row_tiles = (task.num_rows + kTileRows - 1) / kTileRows;
    for (int64_t sample = 0; sample < args.num_samples;) {
      const int64_t left = args.num_samples - sample;
      const int width = left <= 8 ? 8 : left <= 32 || !wide ? 32 : 64;
      task.num_samples = static_cast<int>(std::min<int64_t>(left, width));
      task.grads = static_cast<const unsigned char*>(args.grads) + sample * args.sample_stride * Element::kBytes;
      if (plan.num_ranges > 0) {
        if (width == 8) launch<Matrix, Element, 1>(task, plan.num_ranges, stream);
        if (width == 32) launch<Matrix, Element, 4>(task, plan.num_ranges, stream);
        if (width == 64) launch<Matrix, Element, 8>(task, plan.num_ranges, stream);
      }
      float* const out = args.out + sample * args.proj_dim + row;
      reduce_ranges(Matrix::kOp, {task.partial, plan.num_ranges, task.num_samples, task.num_rows, out, args.proj_dim, args.scale},
                    stream);
      sample += task.num_samples;
    }
  }
}

}  // namespace pyattr::cuda
