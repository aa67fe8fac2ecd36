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
#endif

namespace {

// Parts that a row's columns are split into, each with its own sums: work for more threads than samples, and shorter chains of
// sums. Part of the order of summation, so a function of the layer and D alone; the sums of a sample take 0.5 MB at most.
int64_t num_parts(const LayerArgs& layer, int64_t proj_dim) {
  constexpr int64_t kMostParts = 8, kSumFloats = 1 << 17, kPartColumns = 1024;
  return std::clamp<int64_t>(std::min(kSumFloats / proj_dim, layer.row_columns() / kPartColumns), 1, kMostParts);
}

}  // namespace

void layer_sketch(const LayerArgs& layer, const SketchArgs& sketch, int num_threads) {
  const int64_t B = layer.num_samples, D = sketch.proj_dim, columns = layer.row_columns();
  if (B == 0 || columns == 0 || layer.out_channels == 0 || layer.positions() == 0) return;
  LayerKernel kernel = layer_chunk;
#if defined(PYATTR_X86)
  if (simd_level() == SimdLevel::avx2) kernel = layer_chunk_avx2;
  if (simd_level() == SimdLevel::avx512) kernel = layer_chunk_avx512;
#endif
  const int64_t parts = num_parts(layer, D), slab = std::min<int64_t>(B, 8), slabs = (B + slab - 1) / slab;
  std::vector<float> sums(static_cast<size_t>(B * parts * D));  // [slabs][parts][slab][D]
  parallel_for(slabs * parts, usable_threads(num_threads), [&](int64_t task) {
    const int64_t first = task / parts * slab, last = std::min(B, first + slab), part = task % parts;
    kernel({&layer, &sketch, first, last, part * columns / parts, (part + 1) * columns / parts,
            sums.data() + (first * parts + part * (last - first)) * D});
  });
  for (int64_t b = 0; b < B; ++b) {
    const int64_t first = b / slab * slab, samples = std::min(slab, B - first);
    float* const out = sketch.out + b * D;
    for (int64_t part = 0; part < parts; ++part) {
      const float* const sum = sums.data() + (first * parts + part * samples + b - first) * D;
      for (int64_t j = 0; j < D; ++j) out[j] += sketch.scale * sum[j];
    }
  }
}

}  // namespace pyattr::cpu
