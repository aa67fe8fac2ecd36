// What the CPU projections share: the tile that one thread computes, and the split of the work into tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "common/project_args.h"

namespace pyattr::cpu {

// Columns whose products are summed before the sum joins the total; part of the order of summation, so of the result's bits.
constexpr int64_t kChunkColumns = 32768;

// Rows of the random matrix in a tile: their sums for a slab of samples stay in a 512 KB second-level cache.
constexpr int64_t kTileRows = 1024;

// One tile: rows [row_begin, row_end) times columns [column_begin, column_end) of grads, all samples.
// sums[b * sums_stride + (j - row_begin)] (+)= the products' sum, unscaled.
struct ProjectTile {
  const ProjectArgs* args;
  int64_t row_begin, row_end;        // of D
  int64_t column_begin, column_end;  // of P, inside one chunk of absolute columns
  float* sums;                       // [B, sums_stride]
  int64_t sums_stride;
  bool add;                          // add to sums, rather than overwrite
};

using TileKernel = void (*)(const ProjectTile&);

// Samples of a wave of chunks, and the fewest rows of a tile: below them its tables cost more than its sums.
constexpr int64_t kWaveSamples = 64, kFewestRows = 64;

// Columns [bounds[k], bounds[k + 1]) are chunk k; chunks end at multiples of kChunkColumns of the absolute column.
inline std::vector<int64_t> chunk_bounds(const ProjectArgs& args) {
  std::vector<int64_t> bounds{0};
  while (bounds.back() < args.num_columns) {
    const int64_t absolute = args.column_offset + bounds.back();
    bounds.push_back(std::min(args.num_columns, bounds.back() + kChunkColumns - absolute % kChunkColumns));
  }
  return bounds;
}

// The same projection of samples [begin, end) alone.
inline ProjectArgs samples_of(const ProjectArgs& args, int64_t begin, int64_t end) {
  const int64_t bytes = args.dtype == Dtype::float32 ? 4 : 2;
  ProjectArgs part = args;
  part.grads = static_cast<const char*>(args.grads) + begin * args.sample_stride * bytes;
  part.num_samples = end - begin;
  part.out = args.out + begin * args.proj_dim;
  return part;
}

// Few rows for the threads there are: they share the chunks too, some chunks at a time, whose sums are joined in order. The
// waves of sums take 16 KB per thread, and what rounding the rows up to tiles adds.
inline void project_few_rows(const ProjectArgs& args, int threads, TileKernel kernel, const std::vector<int64_t>& bounds) {
  const int64_t D = args.proj_dim, num_chunks = static_cast<int64_t>(bounds.size()) - 1;
  const int64_t rows = std::min(D, kFewestRows), row_tiles = (D + rows - 1) / rows;
  const int64_t width = std::min(num_chunks, (threads + row_tiles - 1) / row_tiles);  // chunks at a time
  std::vector<float> wave(static_cast<size_t>(width * std::min(args.num_samples, kWaveSamples) * D));  // [width][B'][D]
  for (int64_t sample = 0; sample < args.num_samples; sample += kWaveSamples) {
    const ProjectArgs part = samples_of(args, sample, std::min(args.num_samples, sample + kWaveSamples));
    const int64_t size = part.num_samples * D;
    for (int64_t first = 0; first < num_chunks; first += width) {
      const int64_t count = std::min(width, num_chunks - first);
      parallel_for(count * row_tiles, threads, [&](int64_t task) {
        const int64_t i = task / row_tiles, begin = task % row_tiles * rows;
        kernel({&part, begin, std::min(D, begin + rows), bounds[first + i], bounds[first + i + 1],
                wave.data() + i * size + begin, D, false});
      });
      for (int64_t i = 0; i < count; ++i)
        for (int64_t e = 0; e < size; ++e)
          part.out[e] = first + i == 0 ? wave[i * size + e] : part.out[e] + wave[i * size + e];
    }
    for (int64_t e = 0; e < size; ++e) part.out[e] *= args.scale;
  }
}

// Runs the kernel over all of D x P. Whatever the split, entry (b, j) is the sum over chunks, in order, of the chunk's sum.
inline void project(const ProjectArgs& args, int num_threads, TileKernel kernel) {
  const int64_t B = args.num_samples, D = args.proj_dim;
  if (B == 0 || D == 0) return;
  const std::vector<int64_t> bounds = chunk_bounds(args);
  const int64_t num_chunks = static_cast<int64_t>(bounds.size()) - 1;
  const int threads = usable_threads(num_threads);
  if (threads > 1 && num_chunks > 1 && D < kFewestRows * threads) {
    project_few_rows(args, threads, kernel, bounds);
    return;
  }
  // As many tiles as the cache asks for, rounded up so that every thread has the same number of them.
  const int64_t wanted = ((D + kTileRows - 1) / kTileRows + threads - 1) / threads * threads;
  const int64_t rows = std::max((D + wanted - 1) / wanted, std::min(D, kFewestRows));
  parallel_for((D + rows - 1) / rows, threads, [&](int64_t tile) {
    const int64_t begin = tile * rows, end = std::min(D, begin + rows);
    for (int64_t k = 0; k < num_chunks; ++k)
      kernel({&args, begin, end, bounds[k], bounds[k + 1], args.out + begin, D, k > 0});
    for (int64_t b = 0; b < B; ++b)
      for (int64_t j = begin; j < end; ++j)
        args.out[b * D + j] = num_chunks == 0 ? 0.0f : args.out[b * D + j] * args.scale;
  });
}

}  // namespace pyattr::cpu
