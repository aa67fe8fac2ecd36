// Y = G M^T for the sparse matrix of common/sketch.h, gathered: every thread owns outputs and adds up their columns in registers.
// Nothing is stored but sums, nothing is added atomically.
//
// Order of summation, the same for any device, batch and repetition: an output's sum takes the tiles of a range of columns in
// ascending order; after kSketchChunkTiles tiles it is added to the range's partial sum in memory; reduce_kernel adds the
// ranges in order. The ranges depend on (P, column_offset, D) alone: a tile belongs to the range that its first column is in,
// and the first range begins with the tile that holds column_offset. Columns outside G add zeros, which change no bit of a sum
// that starts at +0.
#pragma once

#include "common/sketch.h"
#include "cuda/device.cuh"
#include "cuda/exact_float.cuh"
#include "cuda/summation.cuh"

namespace pyattr::cuda {

constexpr int kMaxNonzeros = 8;

// What one launch computes: num_samples samples, a multiple of the kernel's kSamples.
struct SketchTask {
  const unsigned char* grads;  // [num_samples, num_columns]
  int64_t num_columns;
  int64_t sample_bytes;        // from sample to sample
  int64_t column_bytes;        // from column to column
  int64_t column_offset;
  int64_t range_columns, num_ranges;
  int64_t parts;               // thread blocks per range and kSamples samples
  int64_t num_samples;
  float* sums;                 // [num_ranges, num_samples, proj_dim]
  int64_t proj_dim;
  float scale;                 // of the sums
  int nonzeros, lanes;         // s, W
  uint32_t seed, stream;
  int64_t first[kMaxNonzeros + 1];   // F_r
  int64_t smallest;                  // groups have this many blocks, or one more
  uint32_t inverse[2][kNumPrimes];   // of a modulo smallest, smallest + 1
};

// Element types: one element as float32 bits.
struct SketchFloat32 {
  static constexpr int kBytes = 4;
  __device__ __forceinline__ static uint32_t load(const unsigned char* from) { return load_global<uint32_t>(from); }
};
struct SketchBFloat16 {
  static constexpr int kBytes = 2;
  __device__ __forceinline__ static uint32_t load(const unsigned char* from) {
    return static_cast<uint32_t>(load_global<uint16_t>(from)) << 16;
  }
};
struct SketchFloat16 {
  static constexpr int kBytes = 2;
  __device__ __forceinline__ static uint32_t load(const unsigned char* from) {
    return half_to_float_bits(load_global<uint16_t>(from));
  }
};

// Which part of the outputs, samples and columns a thread block has.
struct SketchPlace {
  int64_t part, sample, range;
};
__device__ __forceinline__ SketchPlace sketch_place(const SketchTask& task, int samples) {
  // Parts run fastest: those at work at one time read the same columns.
  const int64_t block = blockIdx.x, sample_groups = task.num_samples / samples;
  return {block % task.parts, block / task.parts % sample_groups * samples, block / task.parts / sample_groups};
}

// Tiles [begin, end) of a range, for a group of `size` blocks.
struct SketchTiles {
  int64_t begin, end;
};
__device__ __forceinline__ SketchTiles sketch_tiles(const SketchTask& task, int64_t range, int64_t size) {
  const int64_t tile_columns = size * task.lanes;
  const int64_t from = task.column_offset + range * task.range_columns;
  const int64_t to = task.column_offset + (range + 1 < task.num_ranges ? (range + 1) * task.range_columns : task.num_columns);
  return {(from + (range == 0 ? 0 : tile_columns - 1)) / tile_columns, (to + tile_columns - 1) / tile_columns};
}

__device__ __forceinline__ int64_t group_size(const SketchTask& task, int r) { return task.first[r + 1] - task.first[r]; }

// What a tile does to a group's blocks: block h of the rows takes block inverse * (h - b) mod size of the columns.
struct SketchGather {
  uint32_t inverse, b;
  int x;
};
__device__ __forceinline__ SketchGather sketch_gather(const SketchTask& task, int64_t tile, int r, int64_t size) {
  const SketchTile drawn = sketch_tile(tile, r, size, task.lanes, task.seed, task.stream);
  return {task.inverse[size == task.smallest ? 0 : 1][drawn.prime], drawn.b, static_cast<int>(drawn.x)};
}
__device__ __forceinline__ uint32_t source_block(const SketchGather& gather, int64_t h, int64_t size) {
  const uint64_t apart = static_cast<uint64_t>(h >= gather.b ? h - gather.b : h + size - gather.b);
  return static_cast<uint32_t>(gather.inverse * apart % static_cast<uint64_t>(size));
}

// The word of 32 columns' signs that holds column i, every bit inverted: a set bit means -1.
__device__ __forceinline__ uint32_t minus_signs(const SketchTask& task, int64_t column, int r) {
  const PhiloxBlock call = pyattr::philox4x32_10(static_cast<uint32_t>(column / kSignsPerCall), static_cast<uint32_t>(r), task.seed,
                                         task.stream, kSketchSigns);
  const int word = static_cast<int>(column / 32 % 4);
  // Selected, not indexed: an index would put the words into memory.
  return ~(word < 2 ? (word == 0 ? call.word[0] : call.word[1]) : (word == 2 ? call.word[2] : call.word[3]));
}

__device__ __forceinline__ float with_sign(uint32_t bits, uint32_t minus, int bit) {
  return float_of(bits ^ (minus << (31 - bit) & 0x80000000u));
}

// Adds sums[i] to where sum(i) points and clears them. `first` and `last` chunk of the range.
__device__ __forceinline__ void flush(const SketchTask& task, float& sum, float* to, bool first, bool last) {
  const float total = first ? sum : *to + sum;
  *to = last ? task.scale * total : total;
  sum = 0.0f;
}

// Blocks of 32 lanes. A warp owns kQuads quads of blocks: four neighbours of one group, a lane each output. For every 32 / kQuads
// tiles, each lane works out one quad of one tile (a unit), five calls of Philox and one division, and leaves it in shared
// memory, where the whole warp reads it: the cost per element is 1/32 of that, divided by the samples.
constexpr int kSketchWarps = 16;
constexpr int kQuadBlocks = 4;

struct alignas(16) SketchUnit {
  int64_t first_column;         // of the tile, counted from G's first
  int x;
  enum Kind : int { kOutside, kPartly, kInside } kind;  // how the tile lies to the range and to G
  uint32_t source[kQuadBlocks];  // block of the tile
  uint32_t minus[kQuadBlocks];   // its signs, inverted
};

struct SketchQuad {
  int r;
  int64_t h;  // first of its blocks, in the group
  int64_t size;
};

// The last quad of a group may reach past its end, and the last quads of a thread block past the last group: what they sum is
// read from blocks that exist, and left.
__device__ __forceinline__ SketchQuad sketch_quad(const SketchTask& task, int64_t index) {
  const int64_t quads = (task.smallest + (task.smallest * task.nonzeros < task.first[task.nonzeros]) + kQuadBlocks - 1) / kQuadBlocks;
  const int r = static_cast<int>(index / quads < task.nonzeros ? index / quads : task.nonzeros - 1);
  return {r, (index - r * quads) * kQuadBlocks, group_size(task, r)};
}

__device__ __forceinline__ SketchUnit sketch_unit(const SketchTask& task, const SketchQuad& quad, int64_t tile, int64_t end) {
  SketchUnit unit{};
  if (tile >= end) return unit;  // kOutside
  unit.first_column = tile * quad.size * 32 - task.column_offset;
  const bool inside = unit.first_column >= 0 && unit.first_column + quad.size * 32 <= task.num_columns;
  unit.kind = inside ? SketchUnit::kInside : SketchUnit::kPartly;
  const SketchGather gather = sketch_gather(task, tile, quad.r, quad.size);
  unit.x = gather.x;
  uint32_t source = source_block(gather, quad.h % quad.size, quad.size);
#pragma unroll
  for (int k = 0; k < kQuadBlocks; ++k) {
    unit.source[k] = source;
    unit.minus[k] = minus_signs(task, (tile * quad.size + source) * 32, quad.r);
    source += gather.inverse;  // below 2^32: both are below a size, at most 2^31
    if (source >= quad.size) source -= static_cast<uint32_t>(quad.size);
  }
  return unit;
}

// The unit's elements with their signs.
template <class Element, int kSamples, bool kInside>
__device__ __forceinline__ void load_unit(const SketchTask& task, const unsigned char* grads, const SketchUnit& unit,
                                          float (&value)[kQuadBlocks][kSamples]) {
  const int from_lane = static_cast<int>(threadIdx.x % 32) ^ unit.x;
#pragma unroll
  for (int k = 0; k < kQuadBlocks; ++k) {
    const int64_t column = unit.first_column + static_cast<int64_t>(unit.source[k]) * 32 + from_lane;
    const bool inside = kInside || (column >= 0 && column < task.num_columns);
    const unsigned char* const from = grads + column * task.column_bytes;
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      value[k][s] = with_sign(inside ? Element::load(from + s * task.sample_bytes) : 0u, unit.minus[k], from_lane);
    }
  }
}

template <class Element, int kSamples, int kQuads>
__global__ void __launch_bounds__(32 * kSketchWarps, kSamples <= 2 ? 2 : 1) sketch_blocks_kernel(const SketchTask task) {
  constexpr int kTiles = 32 / kQuads;  // of a batch
  constexpr int kLoads = kSamples >= 4 ? 1 : 4 / kSamples;  // units whose loads are under way together: 16 or 32 loads
  constexpr int kStep = kLoads > kQuads ? kLoads : kQuads;
  static_assert(kSketchChunkTiles % kTiles == 0, "a chunk is a number of batches");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  SketchUnit* const units = reinterpret_cast<SketchUnit*>(dynamic_shared()) + 32 * warp;
  const SketchPlace place = sketch_place(task, kSamples);
  const unsigned char* const grads = task.grads + place.sample * task.sample_bytes;
  const int64_t first_quad = (place.part * (blockDim.x / 32) + warp) * kQuads;

  const SketchQuad mine = sketch_quad(task, first_quad + lane % kQuads);  // the one this lane works out
  const SketchTiles tiles = sketch_tiles(task, place.range, mine.size);
  const SketchTiles small = sketch_tiles(task, place.range, task.smallest), large = sketch_tiles(task, place.range, task.smallest + 1);
  const int64_t most = small.end - small.begin > large.end - large.begin ? small.end - small.begin : large.end - large.begin;

  float sums[kQuads][kQuadBlocks][kSamples] = {};
  for (int64_t done = 0;;) {  // tiles
    units[lane] = sketch_unit(task, mine, tiles.begin + done + lane / kQuads, tiles.end);
    if (warp_barrier_and(units[lane].kind == SketchUnit::kInside)) {
#pragma unroll 1
      for (int unit = 0; unit < 32; unit += kStep) {
#pragma unroll
        for (int group = 0; group < kStep; group += kLoads) {
          float value[kLoads][kQuadBlocks][kSamples];
#pragma unroll
          for (int i = 0; i < kLoads; ++i) load_unit<Element, kSamples, true>(task, grads, units[unit + group + i], value[i]);
#pragma unroll
          for (int i = 0; i < kLoads; ++i) {
#pragma unroll
            for (int k = 0; k < kQuadBlocks; ++k) {
#pragma unroll
              for (int s = 0; s < kSamples; ++s) sums[(group + i) % kQuads][k][s] += value[i][k][s];
            }
          }
        }
      }
    } else {
#pragma unroll 1
      for (int unit = 0; unit < 32; unit += kQuads) {
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
          if (units[unit + quad].kind == SketchUnit::kOutside) continue;
          float value[kQuadBlocks][kSamples];
          load_unit<Element, kSamples, false>(task, grads, units[unit + quad], value);
#pragma unroll
          for (int k = 0; k < kQuadBlocks; ++k) {
#pragma unroll
            for (int s = 0; s < kSamples; ++s) sums[quad][k][s] += value[k][s];
          }
        }
      }
    }
    warp_barrier();  // the units are read
    const bool first = done < kSketchChunkTiles;
    done += kTiles;
    const bool last = done >= most;
    if (last || done % kSketchChunkTiles == 0) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const SketchQuad quad = sketch_quad(task, first_quad + q);
        float* const to = task.sums + (place.range * task.num_samples + place.sample) * task.proj_dim +
                          (task.first[quad.r] + quad.h) * 32 + lane;
#pragma unroll
        for (int k = 0; k < kQuadBlocks; ++k) {
#pragma unroll
          for (int s = 0; s < kSamples; ++s) {
            if (quad.h + k < quad.size) flush(task, sums[q][k][s], to + s * task.proj_dim + 32 * k, first, last);
          }
        }
      }
    }
    if (last) return;
  }
}

// Blocks of fewer lanes, hence D not a multiple of 32 or small: a thread owns an output and works everything out for itself.
constexpr int kSketchThreads = 256;

template <class Element, int kSamples>
__global__ void __launch_bounds__(kSketchThreads) sketch_outputs_kernel(const SketchTask task) {
  const SketchPlace place = sketch_place(task, kSamples);
  const int64_t output = place.part * kSketchThreads + threadIdx.x;
  if (output >= task.proj_dim) return;
  const unsigned char* const grads = task.grads + place.sample * task.sample_bytes;
  const int64_t block = output / task.lanes;
  const int lane = static_cast<int>(output % task.lanes);
  int r = 0;
  while (task.first[r + 1] <= block) ++r;
  const int64_t size = group_size(task, r);
  const SketchTiles tiles = sketch_tiles(task, place.range, size);
  float* const to = task.sums + (place.range * task.num_samples + place.sample) * task.proj_dim + output;

  float sums[kSamples] = {};
  for (int64_t done = 0;; ) {
    const int64_t tile = tiles.begin + done;
    if (tile < tiles.end) {
      const SketchGather gather = sketch_gather(task, tile, r, size);
      const int64_t column =
          (tile * size + source_block(gather, block - task.first[r], size)) * task.lanes + (lane ^ gather.x);
      const int64_t at = column - task.column_offset;
      if (at >= 0 && at < task.num_columns) {
        const uint32_t minus = minus_signs(task, column, r);
        const unsigned char* const from = grads + at * task.column_bytes;
#pragma unroll
        for (int s = 0; s < kSamples; ++s) {
          sums[s] += with_sign(Element::load(from + s * task.sample_bytes), minus, static_cast<int>(column % 32));
        }
      }
    }
    const bool first = done < kSketchChunkTiles;
    ++done;
    const bool last = tiles.begin + done >= tiles.end;
    if (last || done % kSketchChunkTiles == 0) {
#pragma unroll
      for (int s = 0; s < kSamples; ++s) flush(task, sums[s], to + s * task.proj_dim, first, last);
    }
    if (last) return;
  }
}

}  // namespace pyattr::cuda
