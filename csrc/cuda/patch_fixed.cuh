// Distances to 8-bit images on integer tensor cores, exact but for the last bit of the query's pixels.
//
// With the bytes b of an image, s y = s (2 b - 255) / 255 = (2 s / 255) (c + 1/2), c = b - 128, so that with z = 127.5 x / s - 1/2
//   |x - s y|^2 = (2 s / 255)^2 sum (z - c)^2 = (2 s / 255)^2 (sum z^2 - 2 sum z c + sum c^2).
// A sum of a 2 x 2 block, times 1/2, is w / 255 with w the sum of its bytes less 510, so that there z = 255 x / s and
//   |x - s y|^2 = (s / 255)^2 sum (z - w)^2, and w = 4 h + l with h and l in bytes: sum z w = 4 sum z h + sum z l.
// z is rounded to a multiple of 2^-f, f at most 16 and as large as 24 bits allow, and cut into three signed bytes. Products are
// summed in int32, and the three sums with those of the squares in int64, where nothing cancels: the one rounding is that of z,
// at most 2^-f / 2 (about 1e-7 of the pixels' range, what float32 itself would lose), beside that of the result. A query with
// pixels beyond 24 bits of f = 0 keeps the difference kernel; that is decided on the device.
//
// Largest error of d / (2 sigma^2) over the windows within 25 of the nearest, from a model of this arithmetic on CIFAR-10 (p = 7):
// 1.1e-4, 3.2e-5, 1.6e-5, 1.6e-5 for sigma^2 = 2.2e-4, 2.2e-3, 0.105, 0.92; differences in float32 1.3e-5, 1.7e-5, 2.4e-5, 3.5e-5.
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
constexpr int64_t kPatchMostSamples = 1 << 14;      // of a window: their products with bytes, 4 h + l, sum to less than 2^31
constexpr int kPatchColumnTiles = 4;                // of 8 image windows, at a time

struct PatchPrecision {
  int32_t fixed;  // 1 if the query's pixels fit
  int32_t bits;   // f
};

struct PatchFixed {
  const float* query;       // [channels, query_rows, query_columns], the border's zeros in it
  int query_rows, query_columns;
  double factor, shift;     // z = factor * x - shift
  float unit;               // of squares: (2 s / 255)^2 or (s / 255)^2
  PatchPrecision* precision;
  int groups;               // of four channels
  int steps;                // of 8 k-slots
  int64_t pairs;            // tiles of kPatchPair query windows
  uint4* limbs;             // [pairs, steps, kPatchLimbs, 32]
  int64_t* squares;         // [pairs, kPatchPair]: sum z^2 in units of 2^-f
  int layers;               // of bytes: c alone, or h and l
  int height, width;        // of an image's layer
  uint32_t* words;          // [images, layers, groups, height, width]
  int64_t parts;            // thread blocks that share an image
};

__device__ __forceinline__ int64_t patch_fixed_value(const PatchFixed& fixed, int bits, float x) {
  return llrint(fma(fixed.factor, static_cast<double>(x), -fixed.shift) * static_cast<double>(int64_t{1} << bits));
}

// The query's sample `tap` of a window.
__device__ __forceinline__ float patch_query_sample(const PatchFixed& fixed, const PatchGeometry& g, const PatchWindow& window,
                                                    int64_t channel, int64_t tap) {
  const int64_t row = window.row + tap / g.taps * g.step, column = window.column + tap % g.taps * g.step;
  return fixed.query[(channel * fixed.query_rows + row) * fixed.query_columns + column];
}

struct PatchPrecisionTask {
  PatchFixed fixed;
  int channels;
};

// The larger, or the first NaN.
__device__ __forceinline__ double patch_larger(double a, double b) { return a != a || a >= b ? a : b; }

// One thread block looks for the largest |z|.
static __global__ void patch_precision_kernel(const PatchPrecisionTask task) {
  const PatchFixed& fixed = task.fixed;
  double* const most = reinterpret_cast<double*>(dynamic_shared());  // [kPatchThreads]
  const int64_t total = static_cast<int64_t>(task.channels) * fixed.query_rows * fixed.query_columns;
  double own = 0.0;
  for (int64_t i = threadIdx.x; i < total; i += kPatchThreads) {
    own = patch_larger(own, fabs(fma(fixed.factor, static_cast<double>(fixed.query[i]), -fixed.shift)));
  }
  most[threadIdx.x] = own;
  barrier();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kPatchThreads; ++i) own = patch_larger(own, most[i]);
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
    const PatchWindow window = patch_window(g, 2 * pair, row);
    uint32_t limb[kPatchLimbs] = {};
    const int tap = slot % (g.taps * g.taps), first = slot / (g.taps * g.taps) * 4;
    for (int c = 0; c < 4 && window.there && first + c < g.channels; ++c) {
      const float sample = patch_query_sample(fixed, g, window, first + c, tap);
      int32_t rest = static_cast<int32_t>(patch_fixed_value(fixed, fixed.precision->bits, sample));
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
    const PatchWindow window = patch_window(g, i / kPatchRows, static_cast<int>(i % kPatchRows));
    int64_t sum = 0;
    for (int64_t k = 0; k < patch_samples(g) && window.there; ++k) {
      const float sample = patch_query_sample(fixed, g, window, k / (g.taps * g.taps), k % (g.taps * g.taps));
      const int64_t z = patch_fixed_value(fixed, bits, sample);
      sum += z * z;
    }
    fixed.squares[i] = bits == 0 ? sum : (sum + (int64_t{1} << (bits - 1))) >> bits;
  }
}

struct PatchWordsTask {
  PatchImages from;
  int channels, groups, layers, height, width;  // of a layer: one row and one column less than the image's where blocks are summed
  int64_t count;
  uint32_t* words;  // [count, layers, groups, height, width], four signed bytes each, 0 for a channel that there is not
};

static __global__ void patch_words_kernel(const PatchWordsTask task) {
  const int64_t* const s = task.from.strides;
  const int64_t size = static_cast<int64_t>(task.height) * task.width, total = task.count * task.groups * size;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const int64_t column = i % task.width, row = i % size / task.width, group = i / size % task.groups;
    const int64_t image = i / size / task.groups;
    uint32_t words[2] = {};
    for (int c = 0; c < 4 && 4 * group + c < task.channels; ++c) {
      const unsigned char* const from = task.from.pixels + image * s[0] + (4 * group + c) * s[1] + row * s[2] + column * s[3];
      const auto pixel = [&](int down, int right) -> int32_t { return load_global<uint8_t>(from + down * s[2] + right * s[3]); };
      if (task.layers == 1) {
        words[0] |= static_cast<uint32_t>(pixel(0, 0) ^ 0x80) << 8 * c;
      } else {
        const int32_t above = pixel(0, 0) + pixel(0, 1) + pixel(1, 0) + pixel(1, 1) + 2;  // w + 512 = 4 (h + 128) + l
        words[0] |= static_cast<uint32_t>((above / 4 - 128) & 0xFF) << 8 * c;
        words[1] |= static_cast<uint32_t>(above % 4) << 8 * c;
      }
    }
    for (int layer = 0; layer < task.layers; ++layer) {
      task.words[((image * task.layers + layer) * task.groups + group) * size + i % size] = words[layer];
    }
  }
}

// Shared memory before the distances, in words: where a k-slot lies from a window's first sample, the sum of squares of every
// window of the image, the image.
PYATTR_HOST_DEVICE int64_t patch_fixed_tables(const PatchFixed& fixed, const PatchGeometry& g) {
  const int64_t tables = static_cast<int64_t>(fixed.steps) * 8 + static_cast<int64_t>(g.rows.image_whole) * g.columns.image_whole +
                         static_cast<int64_t>(fixed.layers) * fixed.groups * fixed.height * fixed.width;
  return (tables + 3) / 4 * 4;
}

struct PatchFixedTask {
  PatchTask task;
  PatchFixed fixed;
};

// sum c^2 or sum w^2 of a window of an image.
__device__ __forceinline__ uint32_t patch_image_squares(const PatchFixed& fixed, const PatchGeometry& g, const int32_t* offsets,
                                                        const uint32_t* from) {
  const int used = fixed.groups * g.taps * g.taps;
  uint32_t sum = 0;
  for (int slot = 0; slot < used; ++slot) {
    const uint32_t high = from[offsets[slot]];
    if (fixed.layers == 1) {
      sum = static_cast<uint32_t>(dot_bytes(high, high, static_cast<int32_t>(sum)));
      continue;
    }
    const uint32_t low = from[offsets[slot] + fixed.groups * fixed.height * fixed.width];
    sum += static_cast<uint32_t>(16 * dot_bytes(high, high, 0) + 8 * dot_bytes(high, low, 0) + dot_bytes(low, low, 0));
  }
  return sum;
}

// The distances of kPatchPair query windows: distances[row * count + v].
__device__ __forceinline__ void patch_fixed_distances(const PatchFixedTask& both, int64_t pair, int count, const int32_t* offsets,
                                                      const uint32_t* image_squares, const uint32_t* image, float* distances) {
  const PatchFixed& fixed = both.fixed;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int columns = both.task.geometry.columns.image_whole;
  const int64_t one = int64_t{1} << fixed.precision->bits;
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
    for (int layer = 0; layer < fixed.layers; ++layer) {
      if (layer > 0) {
#pragma unroll
        for (int l = 0; l < kPatchLimbs; ++l) {
#pragma unroll
          for (int i = 0; i < kPatchColumnTiles * 4; ++i) sums[l][i / 4][i % 4] *= 4;  // 4 h + l
        }
#pragma unroll
        for (int n = 0; n < kPatchColumnTiles; ++n) from[n] += fixed.groups * fixed.height * fixed.width;
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
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + 8 * (r / 2);
      const int64_t query_squares = fixed.squares[pair * kPatchPair + row];
#pragma unroll
      for (int n = 0; n < kPatchColumnTiles; ++n) {
        const int v = first + 8 * n + 2 * (lane % 4) + r % 2;
        if (v >= count) continue;
        int64_t sum = query_squares + one * static_cast<int64_t>(image_squares[v]);
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
  uint32_t* const squares = reinterpret_cast<uint32_t*>(offsets) + 8 * fixed.steps;  // [count]
  uint32_t* const words = squares + count;                                // [layers, groups, height, width]
  const int image_words = fixed.layers * fixed.groups * fixed.height * fixed.width;
  float* const distances = task.tiles == nullptr ? reinterpret_cast<float*>(offsets) + patch_fixed_tables(fixed, g)
                                                 : task.tiles + blockIdx.x * task.tile_floats;
  const int used = fixed.groups * g.taps * g.taps;
  for (int slot = threadIdx.x; slot < 8 * fixed.steps; slot += kPatchThreads) {
    const int tap = slot % (g.taps * g.taps), group = slot / (g.taps * g.taps);
    offsets[slot] = slot < used ? (group * fixed.height + tap / g.taps * g.step) * fixed.width + tap % g.taps * g.step : 0;
  }
  for (int64_t item = blockIdx.x; item < task.num_images * fixed.parts; item += gridDim.x) {
    const int64_t image = item / fixed.parts;
    for (int i = threadIdx.x; i < image_words; i += kPatchThreads) words[i] = fixed.words[image * image_words + i];
    barrier();
    for (int v = threadIdx.x; v < count; v += kPatchThreads) {
      const uint32_t* const from = words + v / g.columns.image_whole * fixed.width + v % g.columns.image_whole;
      squares[v] = patch_image_squares(fixed, g, offsets, from);
    }
    barrier();
    for (int64_t pair = item % fixed.parts; pair < fixed.pairs; pair += fixed.parts) {
      patch_fixed_distances(both, pair, count, offsets, squares, words, distances);
      barrier();
      patch_rows<Row>(task, 2 * pair, distances, image);
      patch_rows<Row>(task, 2 * pair + 1, distances + static_cast<int64_t>(kPatchRows) * count, image);
      barrier();
    }
  }
}

}  // namespace pyattr::cuda
