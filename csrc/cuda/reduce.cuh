// What every launcher needs: an error with a name, and the last sum over the ranges of columns.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/device.cuh"

namespace pyattr::cuda {

inline void check(cudaError_t error, const char* op, const char* what) {
  if (error == cudaSuccess) return;
  std::string message = std::string(op) + ": " + what + " failed: " + cudaGetErrorName(error) + ", ";
  message += cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    message += "; this build of pyattr has no code for this GPU: set PYATTR_CUDA_ARCHITECTURES to its architecture and rebuild";
  }
  throw std::runtime_error(message);
}

struct ReduceTask {
  const float* partial;  // [num_ranges, num_samples, num_rows]
  int64_t num_ranges, num_samples, num_rows;
  float* out;  // [num_samples, num_rows] with proj_dim elements from sample to sample
  int64_t proj_dim;
  float scale;
};

// out[b, j] = scale * sum over ranges of partial[range, b, j], in order.
static __global__ void reduce_kernel(const ReduceTask task) {
  const int64_t count = task.num_samples * task.num_rows;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    float sum = 0.0f;
    for (int64_t range = 0; range < task.num_ranges; ++range) sum += task.partial[range * count + i];
    task.out[i / task.num_rows * task.proj_dim + i % task.num_rows] = task.scale * sum;
  }
}

inline void reduce_ranges(const char* op, ReduceTask task, cudaStream_t stream) {
  constexpr int kReduceThreads = 256;
  void* arguments[] = {&task};
  const dim3 grid(static_cast<unsigned>((task.num_samples * task.num_rows + kReduceThreads - 1) / kReduceThreads));
  check(cudaLaunchKernel(reduce_kernel, grid, dim3(kReduceThreads), arguments, 0, stream), op, "launching the reduction");
}

}  // namespace pyattr::cuda
