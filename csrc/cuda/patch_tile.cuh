// The distances of query windows to all windows of an image that they may match, and what becomes of each row.
//
// Distances of float32 samples: the difference is formed first, in one fused multiply-add, squared and summed, line by line
// and then over the lines, so that nothing cancels and the sum of 7 x 7 x 3 terms is rounded about 20 times. 2 C p^2 operations
// for every pair of windows. A thread block takes the whole windows a tile at a time, which share a load from the image; a warp
// takes a cut window, which meets a line of an image's windows or a single one.
#pragma once

#include "cuda/patch_select.cuh"
#include "cuda/patch_stage.cuh"

namespace pyattr::cuda {

constexpr int kPatchWarps = kPatchThreads / 32;

// A query against some images.
struct PatchTask {
  PatchGeometry geometry;
  int64_t num_tiles;
  int64_t num_images;
  int rows, columns;     // of an image's plane
  const float* planes;   // [num_images, channels, rows, columns]
  const float* samples;  // [num_tiles, channels * taps * taps, kPatchRows], the query's whole windows
  const float* query;    // [channels, query_rows, query_columns]
  int query_rows, query_columns;
  int longest_cut;       // windows of an image that a cut window meets, at most
  float scale;           // of the images
  float rate;            // log2(e) / (2 sigma^2)
  int64_t tile_floats;   // of a tile of distances
  float* tiles;          // [blocks of the launch, tile_floats], or null where a tile fits into shared memory
  // What comes out, [positions, stats_stride], images from the first of the launch on.
  int64_t positions, stats_stride;
  float *minima, *sums;
  int64_t k;
  float* tops;
  int32_t* nearest;      // or null
  float* pixels;         // [channels, positions, stats_stride]
  const int32_t* fixed;  // 1 if the whole windows are left to another kernel; or null
};

// tile[row * count + v] = |x[row] - scale * y[v]|^2.
__device__ __forceinline__ void patch_differences(const PatchTask& task, const PatchRectangle& images, const float* samples,
                                                  const float* planes, float* tile) {
  const PatchGeometry& g = task.geometry;
  const int count = patch_count(images);
  for (int v = threadIdx.x; v < count; v += kPatchThreads) {
    const int row = images.row + v / images.columns, column = images.column + v % images.columns;
    float sums[kPatchRows] = {};
    const float* x = samples;
    for (int channel = 0; channel < g.channels; ++channel) {
      for (int i = 0; i < g.taps; ++i) {
        const float* line = planes + (static_cast<int64_t>(channel) * task.rows + row + i * g.step) * task.columns + column;
        float lines[kPatchRows] = {};
        for (int j = 0; j < g.taps; ++j) {
          const float y = line[j * g.step];
#pragma unroll
          for (int r = 0; r < kPatchRows; ++r) {
            const float apart = multiply_add(-task.scale, y, x[r]);
            lines[r] = multiply_add(apart, apart, lines[r]);
          }
          x += kPatchRows;
        }
#pragma unroll
        for (int r = 0; r < kPatchRows; ++r) sums[r] = add(sums[r], lines[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kPatchRows; ++r) tile[static_cast<int64_t>(r) * count + v] = sums[r];
  }
}

// An infinite minimum is written as the largest float, beside sums of 0: numbers that a join needs no exception for.
__device__ __forceinline__ float patch_minimum(const PatchRow& row) {
  return fminf(row.least, float_of(0x7F7FFFFFu));
}

// What is kept of a row of distances: its sums, and those of its k nearest.
struct TopRow {
  template <class Values>
  __device__ __forceinline__ static void finish(const PatchTask& task, const PatchRectangle& images, Values values,
                                                int64_t image, int64_t position) {
    const PatchRow row = patch_sum(values, task.rate);
    const float top = patch_top(values, row, task.k, patch_count(images), task.rate);
    if (threadIdx.x % 32 != 0) return;
    const int64_t to = position * task.stats_stride + image;
    task.minima[to] = patch_minimum(row);
    task.sums[to] = row.sum;
    task.tops[to] = top;
    if (task.nearest == nullptr) return;
    task.nearest[to] = (images.row + row.place / images.columns) * task.geometry.image_columns + images.column +
                       row.place % images.columns;
  }
};

// Its sums, and those of the pixels in the middle of the windows.
struct MeanRow {
  template <class Values>
  __device__ __forceinline__ static void finish(const PatchTask& task, const PatchRectangle& images, Values values,
                                                int64_t image, int64_t position) {
    constexpr int kTogether = 4;  // channels
    const PatchRow row = patch_sum(values, task.rate);
    const bool first = threadIdx.x % 32 == 0;
    const int64_t to = position * task.stats_stride + image;
    if (first) task.minima[to] = patch_minimum(row), task.sums[to] = row.sum;
    const PatchGeometry& g = task.geometry;
    const int centre = (g.taps - 1) / 2;
    const int64_t plane = static_cast<int64_t>(task.rows) * task.columns;
    for (int channel = 0; channel < g.channels; channel += kTogether) {
      float sums[kTogether] = {};
      const float* pixels = task.planes + (image * g.channels + channel) * plane +
                            static_cast<int64_t>(images.row + centre) * task.columns + images.column + centre;
      values.each([&](float apart, int v) {
        const float term = patch_term(apart, task.rate);
        if (term == 0.0f || v >= patch_count(images)) return;  // a window that counts for nothing may have an infinite pixel
        const int64_t at = static_cast<int64_t>(v / images.columns) * task.columns + v % images.columns;
#pragma unroll
        for (int c = 0; c < kTogether; ++c) {
          if (channel + c < g.channels) sums[c] = multiply_add(term, pixels[c * plane + at], sums[c]);
        }
      });
#pragma unroll
      for (int c = 0; c < kTogether; ++c) {
        const float sum = warp_sum(sums[c]);
        if (first && channel + c < g.channels) {
          task.pixels[((channel + c) * task.positions + position) * task.stats_stride + image] = sum;
        }
      }
    }
  }
};

// A row of distances to the windows of `images`, by one warp.
template <class Row, class Values>
__device__ __forceinline__ void patch_finish(const PatchTask& task, const PatchWindow& window, const PatchRectangle& images,
                                             const float* distances, int64_t image) {
  const PatchAxis &rows = task.geometry.rows, &columns = task.geometry.columns;
  const int64_t position =
      static_cast<int64_t>(window.row - rows.begin) * (columns.end - columns.begin) + window.column - columns.begin;
  Row::finish(task, images, Values(distances, patch_count(images)), image, position);
}

// The rows of a tile, a warp each.
template <class Row>
__device__ __forceinline__ void patch_rows(const PatchTask& task, int64_t tile, const float* distances, int64_t image) {
  static_assert(kPatchWarps == kPatchRows, "a warp to a row");
  const int row = threadIdx.x / 32;
  const PatchRectangle images = patch_images(task.geometry);
  const PatchWindow window = patch_window(task.geometry, tile, row);
  if (!window.there) return;
  const int count = patch_count(images);
  const float* const own = distances + static_cast<int64_t>(row) * count;
  // As few registers as hold the row: those left over would be worked on all the same.
  if (count <= 256) {
    patch_finish<Row, HeldValues<8>>(task, window, images, own, image);
  } else if (count <= 768) {
    patch_finish<Row, HeldValues<24>>(task, window, images, own, image);
  } else if (count <= 1024) {
    patch_finish<Row, HeldValues<32>>(task, window, images, own, image);
  } else {
    patch_finish<Row, StreamedValues>(task, window, images, own, image);
  }
}

template <class Row>
__global__ void __launch_bounds__(kPatchThreads) patch_difference_kernel(const PatchTask task) {
  const PatchGeometry& g = task.geometry;
  if (task.fixed != nullptr && *task.fixed) return;
  const int64_t depth = patch_samples(g);
  float* const distances =
      task.tiles == nullptr ? reinterpret_cast<float*>(dynamic_shared()) : task.tiles + blockIdx.x * task.tile_floats;
  for (int64_t item = blockIdx.x; item < task.num_images * task.num_tiles; item += gridDim.x) {
    const int64_t image = item / task.num_tiles, tile = item % task.num_tiles;
    patch_differences(task, patch_images(g), task.samples + tile * depth * kPatchRows,
                      task.planes + image * g.channels * task.rows * task.columns, distances);
    barrier();
    patch_rows<Row>(task, tile, distances, image);
    barrier();
  }
}

// The cut windows, a warp each. Few registers, so that many warps hide each other's waiting.
template <class Row>
__global__ void __launch_bounds__(kPatchThreads, 4) patch_cut_kernel(const PatchTask task) {
  const PatchGeometry& g = task.geometry;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int windows = static_cast<int>(patch_cut_windows(g));
  float* const distances = reinterpret_cast<float*>(dynamic_shared()) + static_cast<int64_t>(warp) * task.longest_cut;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kPatchWarps;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kPatchWarps + warp; item < task.num_images * windows; item += stride) {
    const int64_t image = item / windows;
    const PatchWindow window = patch_cut_window(g, static_cast<int>(item % windows));
    const PatchRectangle images = patch_cut_images(g, window);
    const int count = patch_count(images);
    const float* const planes = task.planes + image * g.channels * task.rows * task.columns;
    for (int v = lane; v < count; v += 32) {
      const int row = images.row + v / images.columns, column = images.column + v % images.columns;
      float sum = 0.0f;
      for (int line = 0; line < g.channels * g.taps; ++line) {
        const int channel = line / g.taps, i = line % g.taps * g.step;
        const float* const x =
            task.query + (static_cast<int64_t>(channel) * task.query_rows + window.row + i) * task.query_columns + window.column;
        const float* const y = planes + (static_cast<int64_t>(channel) * task.rows + row + i) * task.columns + column;
        float along = 0.0f;
        for (int j = 0; j < g.taps; ++j) {
          const float apart = multiply_add(-task.scale, y[j * g.step], x[j * g.step]);
          along = multiply_add(apart, apart, along);
        }
        sum = add(sum, along);
      }
      distances[v] = sum;
    }
    warp_barrier();
    if (count <= 32) {
      patch_finish<Row, HeldValues<1>>(task, window, images, distances, image);
    } else {
      patch_finish<Row, StreamedValues>(task, window, images, distances, image);
    }
    warp_barrier();
  }
}

}  // namespace pyattr::cuda
