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

// Runs the kernel over all of D x P. Whatever the split, entry (b, j) is the sum over chunks, in order, of the chunk's sum.
inline void project(const ProjectArgs& args, int num_threads, TileKernel kernel) {
  const int64_t B = args.num_samples, P = args.num_columns, D = args.proj_dim;
  if (B == 0 || D == 0) return;
  std::vector<int64_t> bounds{0};  // chunk k is columns [bounds[k], bounds[k + 1])
  while (bounds.back() < P) {
    const int64_t absolute = args.column_offset + bounds.back();
    bounds.push_back(std::min(P, bounds.back() + kChunkColumns - absolute % kChunkColumns));
  }
  const int64_t num_chunks = static_cast<int64_t>(bounds.size()) - 1;
  const int threads = usable_threads(num_threads);
  const auto scale_rows = [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < B; ++b)
      for (int64_t j = begin; j < end; ++j)
        args.out[b * D + j] = num_chunks == 0 ? 0.0f : args.out[b * D + j] * args.scale;
  };
  constexpr int64_t kFewestRows = 64;  // below this a tile's tables cost more than its sums
  if (threads == 1 || num_chunks < 2 || D >= kFewestRows * threads) {
    const int64_t per_thread = (D + threads - 1) / threads;
    const int64_t rows = std::clamp<int64_t>(per_thread, std::min(D, kFewestRows), kTileRows);
    parallel_for((D + rows - 1) / rows, threads, [&](int64_t tile) {
      const int64_t begin = tile * rows, end = std::min(D, begin + rows);
      for (int64_t k = 0; k < num_chunks; ++k)
        kernel({&args, begin, end, bounds[k], bounds[k + 1], args.out + begin, D, k > 0});
      scale_rows(begin, end);
    });
    return;
  }
  // Few rows: a wave of chunks at a time, one thread each, joined in order.
  std::vector<float> wave(static_cast<size_t>(threads) * B * D);
  for (int64_t first = 0; first < num_chunks; first += threads) {
    const int64_t count = std::min<int64_t>(threads, num_chunks - first);
    parallel_for(count, threads, [&](int64_t i) {
      kernel({&args, 0, D, bounds[first + i], bounds[first + i + 1], wave.data() + i * B * D, D, false});
    });
    for (int64_t i = 0; i < count; ++i)
      for (int64_t e = 0; e < B * D; ++e) {
        const float sum = wave[i * B * D + e];
        args.out[e] = first + i == 0 ? sum : args.out[e] + sum;
      }
  }
  scale_rows(0, D);
}

}  // namespace pyattr::cpu
