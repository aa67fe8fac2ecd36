// Distances to 8-bit images on integer tensor cores, exact but for the last bit of the query's pixels.
//
// With the bytes b = c + 128 of an image, s y = s (2 b - 255) / 255 = (2 s / 255) (c + 1/2), so that with z = 127.5 x / s - 1/2
//   |x - s y|^2 = (2 s / 255)^2 sum (z - c)^2 = (2 s / 255)^2 (sum z^2 - 2 sum z c + sum c^2).
// z is rounded to a multiple of 2^-f, f at most 16 and as large as 24 bits allow, and cut into three signed bytes. The products
// with c are summed in int32, and the three sums with those of the squares in int64, where nothing cancels: the one rounding is
// that of z, at most 2^-f / 2 (about 1e-7 of the pixels' range, what float32 itself would lose), beside that of the result. A
// query with pixels beyond 24 bits of f = 0 keeps the difference kernel; that is decided on the device.
//
// A k-slot of the tensor core is a pixel's channels, four at a time, so that four bytes of an image lie in one word, and windows
// of neighbouring columns in neighbouring words. 16 query windows share what is read of the image.
#pragma once

#include "cuda/patch_tile.cuh"

namespace pyattr::cuda {

constexpr int kPatchPair = 2 * kPatchRows;          // query windows of a tensor core's tile
constexpr int kPatchLimbs = 3;
constexpr int64_t kPatchLargest = 127 * (65536 + 256 + 1) - 1;  // what three signed bytes reach either way, less a rounding
constexpr int kPatchMostBits = 16;
constexpr int64_t kPatchMostSamples = 1 << 15;      // of a window: their products with bytes sum to less than 2^31
constexpr int kPatchColumnTiles = 4;                // of 8 image windows, at a time

struct PatchPrecision {
  int32_t fixed;  // 1 if the query's pixels fit
  int32_t bits;   // f
};

struct PatchFixed {
  const float* query;      // [channels, query_height, query_width]
  int query_height, query_width;
  double factor;           // 127.5 / s
  float unit;              // (2 s / 255)^2
  PatchPrecision* precision;
  int groups;              // of four channels
  int steps;               // of 8 k-slots
  int64_t pairs;           // tiles of kPatchPair query windows
  uint4* limbs;            // [pairs, steps, kPatchLimbs, 32]
  int64_t* squares;        // [pairs, kPatchPair]: sum z^2 in units of 2^-f
  int height, width;       // of an image
  uint32_t* words;         // [images, groups, height, width]
  int64_t parts;           // thread blocks that share an image
};

PYATTR_HOST_DEVICE int64_t patch_fixed_value(const PatchFixed& fixed, int bits, float x) {
  return llrint((fixed.factor * static_cast<double>(x) - 0.5) * static_cast<double>(int64_t{1} << bits));
}

struct PatchPrecisionTask {
  PatchFixed fixed;
  int channels;
};

// One thread block looks for the largest |z|.
static __global__ void patch_precision_kernel(const PatchPrecisionTask task) {
  const PatchFixed& fixed = task.fixed;
  double* const most = reinterpret_cast<double*>(dynamic_shared());  // [kPatchThreads]
  const int64_t total = static_cast<int64_t>(task.channels) * fixed.query_height * fixed.query_width;
  double own = 0.0;
  for (int64_t i = threadIdx.x; i < total; i += kPatchThreads) {
    const double z = fabs(fixed.factor * static_cast<double>(load_global<float>(fixed.query + i)) - 0.5);
    own = z <= own ? own : z;  // a NaN is kept
  }
  most[threadIdx.x] = own;
  barrier();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kPatchThreads; ++i) own = most[i] <= own ? own : most[i];
  int bits = kPatchMostBits;
  while (bits >= 0 && !(own * static_cast<double>(int64_t{1} << bits) < static_cast<double>(kPatchLargest))) --bits;
  *fixed.precision = {bits >= 0, bits >= 0 ? bits : 0};
}

struct PatchLimbsTask {
  PatchFixed fixed;
  PatchGeometry geometry;
};

// A thread makes one register of a fragment, for all limbs.
static __global__ void patch_limbs_kernel(const PatchLimbsTask task) {
  const PatchFixed& fixed = task.fixed;
  const PatchGeometry& g = task.geometry;
  if (!fixed.precision->fixed) return;
  const int64_t total = fixed.pairs * fixed.steps * 32 * 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const int element = static_cast<int>(i % 4), lane = static_cast<int>(i / 4 % 32);
    const int step = static_cast<int>(i / 128 % fixed.steps);
    const int64_t pair = i / 128 / fixed.steps;
    const int slot = 8 * step + lane % 4 + 4 * (element / 2);
    const int row = lane / 4 + 8 * (element % 2);
    const PatchWindow window = patch_window(patch_tile(g, 2 * pair + row / kPatchRows), row % kPatchRows);
    uint32_t limb[kPatchLimbs] = {};
    const int tap = slot % (g.taps * g.taps), first = slot / (g.taps * g.taps) * 4;
    for (int c = 0; c < 4 && window.there && first + c < g.channels; ++c) {
      const int64_t y = window.row - g.pad + tap / g.taps, x = window.column - g.pad + tap % g.taps;
      const float pixel = load_global<float>(fixed.query + ((first + c) * fixed.query_height + y) * fixed.query_width + x);
      int32_t rest = static_cast<int32_t>(patch_fixed_value(fixed, fixed.precision->bits, pixel));
      for (int l = 0; l < kPatchLimbs; ++l) {
        const int32_t byte = static_cast<int8_t>(rest & 0xFF);
        limb[l] |= static_cast<uint32_t>(byte & 0xFF) << 8 * c;
        rest = (rest - byte) / 256;
      }
    }
    uint32_t* const to = reinterpret_cast<uint32_t*>(fixed.limbs + (pair * fixed.steps + step) * kPatchLimbs * 32 + lane) + element;
    for (int l = 0; l < kPatchLimbs; ++l) to[l * 32 * 4] = limb[l];
  }
}

static __global__ void patch_squares_kernel(const PatchLimbsTask task) {
  const PatchFixed& fixed = task.fixed;
  const PatchGeometry& g = task.geometry;
  if (!fixed.precision->fixed) return;
  const int bits = fixed.precision->bits;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < fixed.pairs * kPatchPair; i += stride) {
    const PatchWindow window = patch_window(patch_tile(g, i / kPatchRows), static_cast<int>(i % kPatchRows));
    int64_t sum = 0;
    for (int64_t k = 0; k < patch_samples(g) && window.there; ++k) {
      const int64_t channel = k / (g.taps * g.taps);
      const int64_t y = window.row - g.pad + k / g.taps % g.taps, x = window.column - g.pad + k % g.taps;
      const float pixel = load_global<float>(fixed.query + (channel * fixed.query_height + y) * fixed.query_width + x);
      const int64_t z = patch_fixed_value(fixed, bits, pixel);
      sum += z * z;
    }
    fixed.squares[i] = bits == 0 ? sum : (sum + (int64_t{1} << (bits - 1))) >> bits;
  }
}

struct PatchWordsTask {
  PatchImages from;
  int channels, groups;
  int64_t count;
  uint32_t* words;  // [count, groups, height, width], four signed bytes each, 0 for a channel that there is not
};

static __global__ void patch_words_kernel(const PatchWordsTask task) {
  const int64_t total = task.count * task.groups * task.from.height * task.from.width;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const int64_t column = i % task.from.width, row = i / task.from.width % task.from.height;
    const int64_t plane = i / task.from.width / task.from.height, image = plane / task.groups;
    const int first = static_cast<int>(plane % task.groups) * 4;
    uint32_t word = 0;
    for (int c = 0; c < 4 && first + c < task.channels; ++c) {
      const int64_t* const s = task.from.strides;
      const uint8_t byte = load_global<uint8_t>(task.from.pixels + image * s[0] + (first + c) * s[1] + row * s[2] + column * s[3]);
      word |= static_cast<uint32_t>(byte ^ 0x80u) << 8 * c;
    }
    task.words[i] = word;
  }
}

// Shared memory before the distances, in words: where a k-slot lies from a window's first pixel, sum c^2 of every window of the
// image, the image.
PYATTR_HOST_DEVICE int64_t patch_fixed_tables(const PatchFixed& fixed, const PatchGeometry& g) {
  const int64_t tables = static_cast<int64_t>(fixed.steps) * 8 + static_cast<int64_t>(g.rows.image_whole) * g.columns.image_whole +
                         static_cast<int64_t>(fixed.groups) * fixed.height * fixed.width;
  return (tables + 3) / 4 * 4;
}

struct PatchFixedTask {
  PatchTask task;
  PatchFixed fixed;
};

// The distances of kPatchPair query windows: distances[row * count + v].
__device__ __forceinline__ void patch_fixed_distances(const PatchFixedTask& both, int64_t pair, int count, const int32_t* offsets,
                                                      const int32_t* image_squares, const uint32_t* image, float* distances) {
  const PatchFixed& fixed = both.fixed;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int columns = both.task.geometry.columns.image_whole;
  const int bits = fixed.precision->bits;
  const int64_t one = int64_t{1} << bits;
  const float scale = fixed.unit / static_cast<float>(one);
  const uint4* const limbs = fixed.limbs + pair * fixed.steps * kPatchLimbs * 32 + lane;
  for (int first = warp * 8 * kPatchColumnTiles; first < count; first += kPatchWarps * 8 * kPatchColumnTiles) {
    const uint32_t* from[kPatchColumnTiles];
    int32_t sums[kPatchLimbs][kPatchColumnTiles][4] = {};
#pragma unroll
    for (int n = 0; n < kPatchColumnTiles; ++n) {
      const int v = first + 8 * n + lane / 4 < count ? first + 8 * n + lane / 4 : count - 1;
      from[n] = image + v / columns * fixed.width + v % columns;
    }
    for (int step = 0; step < fixed.steps; ++step) {
      const int32_t near = offsets[8 * step + lane % 4], far = offsets[8 * step + lane % 4 + 4];
      uint32_t b[kPatchColumnTiles][2];
#pragma unroll
      for (int n = 0; n < kPatchColumnTiles; ++n) b[n][0] = from[n][near], b[n][1] = from[n][far];
#pragma unroll
      for (int l = 0; l < kPatchLimbs; ++l) {
        const uint4 words = limbs[(step * kPatchLimbs + l) * 32];
        const uint32_t a[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int n = 0; n < kPatchColumnTiles; ++n) mma_bytes(sums[l][n], a, b[n][0], b[n][1]);
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + 8 * (r / 2);
      const int64_t query_squares = fixed.squares[pair * kPatchPair + row];
#pragma unroll
      for (int n = 0; n < kPatchColumnTiles; ++n) {
        const int v = first + 8 * n + 2 * (lane % 4) + r % 2;
        if (v >= count) continue;
        int64_t sum = query_squares + one * image_squares[v];
        sum -= 2 * (65536 * static_cast<int64_t>(sums[2][n][r]) + 256 * static_cast<int64_t>(sums[1][n][r]) + sums[0][n][r]);
        distances[static_cast<int64_t>(row) * count + v] = multiply(scale, static_cast<float>(sum > 0 ? sum : 0));
      }
    }
  }
}

template <class Row>
__global__ void __launch_bounds__(kPatchThreads, 2) patch_fixed_kernel(const PatchFixedTask both) {
  const PatchTask& task = both.task;
  const PatchFixed& fixed = both.fixed;
  const PatchGeometry& g = task.geometry;
  if (!fixed.precision->fixed) return;
  const int count = g.rows.image_whole * g.columns.image_whole;
  int32_t* const offsets = reinterpret_cast<int32_t*>(dynamic_shared());  // [8 * steps]
  int32_t* const squares = offsets + 8 * fixed.steps;                     // [count]
  uint32_t* const words = reinterpret_cast<uint32_t*>(squares + count);   // [groups, height, width]
  const int image_words = fixed.groups * fixed.height * fixed.width;
  float* const distances = task.tiles == nullptr ? reinterpret_cast<float*>(offsets) + patch_fixed_tables(fixed, g)
                                                 : task.tiles + blockIdx.x * task.tile_floats;
  const int used = fixed.groups * g.taps * g.taps;
  for (int slot = threadIdx.x; slot < 8 * fixed.steps; slot += kPatchThreads) {
    const int tap = slot % (g.taps * g.taps), group = slot / (g.taps * g.taps);
    offsets[slot] = slot < used ? (group * fixed.height + tap / g.taps) * fixed.width + tap % g.taps : 0;
  }
  for (int64_t item = blockIdx.x; item < task.num_images * fixed.parts; item += gridDim.x) {
    const int64_t image = item / fixed.parts;
    for (int i = threadIdx.x; i < image_words; i += kPatchThreads) words[i] = fixed.words[image * image_words + i];
    barrier();
    for (int v = threadIdx.x; v < count; v += kPatchThreads) {
      const uint32_t* const from = words + v / g.columns.image_whole * fixed.width + v % g.columns.image_whole;
      int32_t sum = 0;
      for (int slot = 0; slot < used; ++slot) sum = dot_bytes(from[offsets[slot]], from[offsets[slot]], sum);
      squares[v] = sum;
    }
    barrier();
    for (int64_t pair = item % fixed.parts; pair < fixed.pairs; pair += fixed.parts) {
      patch_fixed_distances(both, pair, count, offsets, squares, words, distances);
      barrier();
      patch_rows<Row>(task, patch_tile(g, 2 * pair), distances, image);
      patch_rows<Row>(task, patch_tile(g, 2 * pair + 1), distances + static_cast<int64_t>(kPatchRows) * count, image);
      barrier();
    }
  }
}

}  // namespace pyattr::cuda
