// Images and queries in the form that the patch kernels read: planes of float32 with the padding in them, and the samples of
// every query window side by side.
#pragma once

#include "common/patch_args.h"
#include "cuda/device.cuh"
#include "cuda/exact_float.cuh"
#include "cuda/patch_geometry.cuh"
#include "cuda/patch_limits.cuh"
#include "cuda/reduce.cuh"

namespace pyattr::cuda {

constexpr int kPatchThreads = 256;

struct PatchImages {
  const unsigned char* pixels;  // [count, channels, height, width]
  Pixel type;
  int64_t strides[4];  // elements
  int height, width;
};

struct PatchPlanesTask {
  PatchImages from;
  PatchGeometry geometry;
  int rows, columns;  // of a plane
  int64_t count;
  float* planes;  // [count, channels, rows, columns]
};

// A pixel as it is meant, uint8 b as (2b - 255) / 255; 0 outside.
__device__ __forceinline__ float patch_pixel(const PatchImages& from, int64_t image, int channel, int row, int column) {
  if (row < 0 || row >= from.height || column < 0 || column >= from.width) return 0.0f;
  const int64_t offset =
      image * from.strides[0] + channel * from.strides[1] + row * from.strides[2] + column * from.strides[3];
  switch (from.type) {
    case Pixel::float16: return float_of(half_to_float_bits(load_global<uint16_t>(from.pixels + 2 * offset)));
    case Pixel::bfloat16: return float_of(static_cast<uint32_t>(load_global<uint16_t>(from.pixels + 2 * offset)) << 16);
    case Pixel::float32: return load_global<float>(from.pixels + 4 * offset);
    case Pixel::uint8: return static_cast<float>(2 * load_global<uint8_t>(from.pixels + offset) - 255) / 255.0f;
  }
  return 0.0f;
}

static __global__ void patch_planes_kernel(const PatchPlanesTask task) {
  const PatchGeometry& g = task.geometry;
  const int64_t total = task.count * g.channels * task.rows * task.columns;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const int column = static_cast<int>(i % task.columns) - g.pad, row = static_cast<int>(i / task.columns % task.rows) - g.pad;
    const int64_t plane = i / task.columns / task.rows;
    const int64_t image = plane / g.channels;
    const int channel = static_cast<int>(plane % g.channels);
    float value = patch_pixel(task.from, image, channel, row, column);
    if (g.blocks) {
      value = 0.5f * ((value + patch_pixel(task.from, image, channel, row, column + 1)) +
                      (patch_pixel(task.from, image, channel, row + 1, column) +
                       patch_pixel(task.from, image, channel, row + 1, column + 1)));
    }
    task.planes[i] = value;
  }
}

struct PatchSamplesTask {
  PatchGeometry geometry;
  int rows, columns;    // of a plane
  const float* planes;  // [channels, rows, columns]
  int64_t num_tiles;
  float* samples;       // [num_tiles, channels * taps * taps, kPatchRows], 0 where a tile has no window
};

static __global__ void patch_samples_kernel(const PatchSamplesTask task) {
  const PatchGeometry& g = task.geometry;
  const int64_t depth = patch_samples(g), total = task.num_tiles * depth * kPatchRows;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const int64_t k = i / kPatchRows % depth;
    const PatchWindow window = patch_window(g, i / kPatchRows / depth, static_cast<int>(i % kPatchRows));
    float value = 0.0f;
    if (window.there) {
      const int64_t channel = k / (g.taps * g.taps);
      const int row = window.row + static_cast<int>(k / g.taps % g.taps) * g.step;
      const int column = window.column + static_cast<int>(k % g.taps) * g.step;
      value = task.planes[(channel * task.rows + row) * task.columns + column];
    }
    task.samples[i] = value;
  }
}

// Launches: the work of a thread is one element; a kernel's blocks take more than one when there are too many.
template <class Task>
void patch_launch(const char* op, void (*kernel)(Task), const Task& task, int64_t blocks, size_t shared, cudaStream_t stream) {
  if (blocks <= 0) return;
  Task copy = task;
  void* arguments[] = {&copy};
  const dim3 grid(static_cast<unsigned>(blocks < kPatchGrid ? blocks : kPatchGrid));
  check(cudaLaunchKernel(kernel, grid, dim3(kPatchThreads), arguments, shared, stream), op, "launching a kernel");
}
inline int64_t patch_blocks(int64_t elements) { return (elements + kPatchThreads - 1) / kPatchThreads; }

}  // namespace pyattr::cuda
