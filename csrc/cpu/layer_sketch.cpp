#include "cpu/layer_sketch.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/simd_level.h"
#include "cpu/layer_sketch_body.h"

namespace pyattr::cpu {

#if defined(PYATTR_X86)
void layer_chunk_avx2(const LayerTask& task);
void layer_chunk_avx512(const LayerTask& task);
void layer_rows_avx2(const RowsTask& task);
void layer_rows_avx512(const RowsTask& task);
#endif

namespace {

// Parts that a row's columns are split into, each with its own sums: work for more threads than samples, and shorter chains of
// sums. Part of the order of summation, so a function of the layer and D alone; the sums of a sample take 0.5 MB at most.
int64_t num_parts(const LayerArgs& layer, int64_t proj_dim) {
  constexpr int64_t kMostParts = 8, kSumFloats = 1 << 17, kPartColumns = 1024;
  return std::clamp<int64_t>(std::min(kSumFloats / proj_dim, layer.row_columns() / kPartColumns), 1, kMostParts);
}

constexpr int64_t kSlab = 8;              // samples of a task
constexpr int64_t kSumBytes = 16 << 20;

}  // namespace

void layer_sketch(const LayerArgs& layer, const SketchArgs& sketch, int num_threads) {
  const int64_t B = layer.num_samples, D = sketch.proj_dim, columns = layer.row_columns();
  if (B == 0 || columns == 0 || layer.out_channels == 0 || layer.positions() == 0) return;
  LayerKernel kernel = layer_chunk;
#if defined(PYATTR_X86)
  if (simd_level() == SimdLevel::avx2) kernel = layer_chunk_avx2;
  if (simd_level() == SimdLevel::avx512) kernel = layer_chunk_avx512;
#endif
  const int64_t parts = num_parts(layer, D), slab = std::min<int64_t>(B, kSlab), threads = usable_threads(num_threads);
  if (parts == 1) {
    parallel_for((B + slab - 1) / slab, threads, [&](int64_t task) {
      const int64_t first = task * slab;
      kernel({&layer, &sketch, first, std::min(B, first + slab), 0, columns, sketch.out + first * D});
    });
    return;
  }
  // So many samples at a time that their sums take 16 MB at most.
  const int64_t together = std::max(slab, kSumBytes / (4 * parts * D) / slab * slab);
  std::vector<float> sums;  // [slabs][parts][slab][D]
  for (int64_t low = 0; low < B; low += together) {
    const int64_t high = std::min(B, low + together), slabs = (high - low + slab - 1) / slab;
    sums.assign(static_cast<size_t>((high - low) * parts * D), 0.0f);
    const auto at = [&](int64_t first, int64_t samples, int64_t part) {
      return sums.data() + ((first - low) * parts + part * samples) * D;
    };
    parallel_for(slabs * parts, threads, [&](int64_t task) {
      const int64_t first = low + task / parts * slab, last = std::min(high, first + slab), part = task % parts;
      kernel({&layer, &sketch, first, last, part * columns / parts, (part + 1) * columns / parts, at(first, last - first, part)});
    });
    for (int64_t first = low; first < high; first += slab) {
      const int64_t samples = std::min(slab, high - first);
      float* const out = sketch.out + first * D;
      for (int64_t part = 0; part < parts; ++part) {
        const float* const sum = at(first, samples, part);
        for (int64_t e = 0; e < samples * D; ++e) out[e] += sum[e];
      }
    }
  }
}

void layer_gradient(const LayerArgs& layer, float* out, int64_t out_stride, bool add, int num_threads) {
  const int64_t B = layer.num_samples, columns = layer.row_columns(), group_rows = layer.out_channels / layer.groups;
  if (B == 0 || columns == 0 || group_rows == 0) return;
  if (layer.positions() == 0) {
    for (int64_t b = 0; b < B && !add; ++b) std::fill_n(out + b * out_stride, layer.out_channels * columns, 0.0f);
    return;
  }
  RowsKernel kernel = layer_rows;
#if defined(PYATTR_X86)
  if (simd_level() == SimdLevel::avx2) kernel = layer_rows_avx2;
  if (simd_level() == SimdLevel::avx512) kernel = layer_rows_avx512;
#endif
  // Patches are gathered again for each task of a sample, so it has more than one only where there are few samples.
  const int threads = usable_threads(num_threads);
  const int64_t pieces = std::clamp<int64_t>((threads + B * layer.groups - 1) / (B * layer.groups), 1, group_rows);
  parallel_for(B * layer.groups * pieces, threads, [&](int64_t task) {
    const int64_t piece = task % pieces, group = task / pieces % layer.groups, b = task / (pieces * layer.groups);
    const int64_t begin = group_rows * piece / pieces, end = group_rows * (piece + 1) / pieces;
    kernel({&layer, b, group, begin, end, out + b * out_stride + (group * group_rows + begin) * columns, add});
  });
}

}  // namespace pyattr::cpu
