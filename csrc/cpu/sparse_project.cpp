#include "sparse_project.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/simd_level.h"
#include "cpu/sparse_project_body.h"

namespace pyattr::cpu {

#if defined(PYATTR_X86)
void sketch_chunk_avx2(const SketchTask& task);
void transpose_chunk_avx2(const TransposeTask& task);
#endif

namespace {

constexpr int64_t kSumsBytes = 256 << 10;  // sums of the samples that a thread works on: half of a second-level cache
constexpr int64_t kMaxSlab = 16;           // samples that share the tables of a run, which then cost little

// Columns whose products are summed before the sum joins the total: a power of two, 256 entries for each output where there are
// 16 outputs or more. Part of the order of summation, so a function of D alone.
int64_t chunk_columns(int64_t proj_dim) {
  int64_t columns = kRunColumns;
  while (columns * 2 <= 256 * proj_dim) columns *= 2;
  return columns;
}

// The chunk that contains the absolute column `at` ends before or at column_offset + num_columns.
int64_t chunk_end(const SketchArgs& args, int64_t begin, int64_t chunk) {
  return std::min(args.num_columns, begin + chunk - (args.column_offset + begin) % chunk);
}

void scale_rows(float* out, int64_t count, float scale) {
  for (int64_t e = 0; e < count; ++e) out[e] *= scale;
}

void join(const float* sums, int64_t count, float* out) {
  for (int64_t e = 0; e < count; ++e) out[e] += sums[e];
}

}  // namespace

void sparse_project(const SketchArgs& args, int num_threads) {
  const int64_t B = args.num_samples, D = args.proj_dim;
  if (B == 0 || D == 0) return;
  SketchKernel kernel = project_chunk;
#if defined(PYATTR_X86)
  // Of AVX-512 too: both wait for memory.
  if (simd_level() != SimdLevel::scalar) kernel = sketch_chunk_avx2;
#endif
  const int threads = usable_threads(num_threads);
  const int64_t chunk = chunk_columns(D), fit = std::clamp<int64_t>(kSumsBytes / (4 * D), 1, kMaxSlab);
  std::fill_n(args.out, B * D, 0.0f);
  if (threads > 1 && B < threads) {  // threads share the chunks, some at a time, and join their sums in order
    const int64_t together = std::min(B, fit);  // samples
    std::vector<float> wave(static_cast<size_t>(threads * together * D));  // [threads][together][D]
    for (int64_t first = 0; first < B; first += together) {
      const int64_t last = std::min(B, first + together), size = (last - first) * D;
      for (int64_t begin = 0; begin < args.num_columns;) {
        std::vector<int64_t> bounds{begin};
        while (bounds.back() < args.num_columns && static_cast<int>(bounds.size()) <= threads)
          bounds.push_back(chunk_end(args, bounds.back(), chunk));
        const int64_t count = static_cast<int64_t>(bounds.size()) - 1;
        parallel_for(count, threads, [&](int64_t k) {
          float* const sums = wave.data() + k * size;
          std::fill_n(sums, size, 0.0f);
          kernel({&args, first, last, bounds[k], bounds[k + 1], sums});
        });
        for (int64_t k = 0; k < count; ++k) join(wave.data() + k * size, size, args.out + first * D);
        begin = bounds.back();
      }
    }
    scale_rows(args.out, B * D, args.scale);
    return;
  }
  const int64_t slab = std::min(fit, (B + threads - 1) / threads);
  parallel_for((B + slab - 1) / slab, threads, [&](int64_t task) {
    const int64_t first = task * slab, samples = std::min(slab, B - first);
    float* const out = args.out + first * D;
    std::vector<float> sums(static_cast<size_t>(samples * D));
    for (int64_t begin = 0; begin < args.num_columns;) {
      const int64_t end = chunk_end(args, begin, chunk);
      std::fill(sums.begin(), sums.end(), 0.0f);
      kernel({&args, first, first + samples, begin, end, sums.data()});
      join(sums.data(), samples * D, out);
      begin = end;
    }
    scale_rows(out, samples * D, args.scale);
  });
}

void sparse_project_transpose(const SketchArgs& args, int num_threads) {
  const int64_t B = args.num_samples, D = args.proj_dim, P = args.num_columns;
  if (B == 0 || P == 0) return;
  TransposeKernel kernel = transpose_chunk;
#if defined(PYATTR_X86)
  if (simd_level() != SimdLevel::scalar) kernel = transpose_chunk_avx2;
#endif
  const float* coefficients = static_cast<const float*>(args.grads);
  std::vector<float> widened;
  if (args.dtype != Dtype::float32 || args.column_stride != 1 || args.sample_stride != D) {
    widened.resize(static_cast<size_t>(B * D));
    for (int64_t b = 0; b < B; ++b) stage<1>(args, b, 1, 0, D, widened.data() + b * D);
    coefficients = widened.data();
  }
  constexpr int64_t kPiece = 8 * kRunColumns;  // columns of a thread's turn
  parallel_for((P + kPiece - 1) / kPiece, usable_threads(num_threads), [&](int64_t piece) {
    kernel({&args, coefficients, piece * kPiece, std::min(P, (piece + 1) * kPiece)});
  });
}

}  // namespace pyattr::cpu
