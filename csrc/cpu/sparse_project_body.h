// The sparse projection of a chunk of columns and the transpose's, included by one file per SIMD level. Internal linkage throughout.
#include <algorithm>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/sketch_runs.h"
#include "cpu/sketch_task.h"
#include "cpu/stage.h"

namespace pyattr::cpu {
namespace {

constexpr int64_t kRunColumns = 4096;  // columns whose tables (1 KB) and entries (16 KB a sample) stay in the first-level cache

void project_chunk(const SketchTask& task) {
  const SketchArgs& args = *task.args;
  const int lanes = sketch_lanes(args.proj_dim, args.nonzeros);
  const AddRun add = choose_add_run(lanes);
  SketchRun run(kRunColumns, lanes);
  auto staged = aligned_array<float>(kRunColumns);
  const bool in_place = args.dtype == Dtype::float32 && args.column_stride == 1;
  const int64_t first = args.column_offset + task.column_begin, last = args.column_offset + task.column_end;
  for (int64_t start = first / kRunColumns * kRunColumns; start < last; start += kRunColumns) {
    const int64_t begin = std::max(first, start), end = std::min(last, start + kRunColumns);
    // Whole calls of the generator around the run's columns; entries outside are zeros, which add nothing.
    const int64_t low = begin / kSignsPerCall * kSignsPerCall;
    const int64_t columns = (end - low + kSignsPerCall - 1) / kSignsPerCall * kSignsPerCall;
    const bool whole = in_place && low == begin && low + columns == end;
    for (int r = 0; r < args.nonzeros; ++r) {
      make_run({lanes, r, sketch_group(args.proj_dim, args.nonzeros, r), args.seed, args.stream}, low, columns, run);
      for (int64_t b = task.sample_begin; b < task.sample_end; ++b) {
        float* const sums = task.sums + (b - task.sample_begin) * args.proj_dim;
        const float* x = staged.get();
        if (whole) {
          x = static_cast<const float*>(args.grads) + b * args.sample_stride + (begin - args.column_offset);
        } else {
          std::fill_n(staged.get(), columns, 0.0f);
          stage<1>(args, b, 1, begin - args.column_offset, end - args.column_offset, staged.get() + (begin - low));
        }
        add(run, x, sums);
      }
    }
  }
}

// Adds up the nonzeros of a column in turn, so that an entry's bits depend on nothing else.
void transpose_chunk(const TransposeTask& task) {
  const SketchArgs& args = *task.args;
  const int lanes = sketch_lanes(args.proj_dim, args.nonzeros);
  const AddRun add = choose_add_run<true>(lanes);
  std::vector<SketchRun> runs;  // of every nonzero
  for (int r = 0; r < args.nonzeros; ++r) runs.emplace_back(kRunColumns, lanes);
  auto entries = aligned_array<float>(kRunColumns);
  const int64_t first = args.column_offset + task.column_begin, last = args.column_offset + task.column_end;
  for (int64_t start = first / kRunColumns * kRunColumns; start < last; start += kRunColumns) {
    const int64_t begin = std::max(first, start), end = std::min(last, start + kRunColumns);
    const int64_t low = begin / kSignsPerCall * kSignsPerCall;
    const int64_t columns = (end - low + kSignsPerCall - 1) / kSignsPerCall * kSignsPerCall;
    for (int r = 0; r < args.nonzeros; ++r)
      make_run({lanes, r, sketch_group(args.proj_dim, args.nonzeros, r), args.seed, args.stream}, low, columns, runs[r]);
    for (int64_t b = 0; b < args.num_samples; ++b) {
      std::fill_n(entries.get(), columns, 0.0f);
      for (int r = 0; r < args.nonzeros; ++r) add(runs[r], task.coefficients + b * args.proj_dim, entries.get());
      float* const out = args.out + b * args.num_columns + (begin - args.column_offset);
      for (int64_t c = 0; c < end - begin; ++c) out[c] = args.scale * entries[begin - low + c];
    }
  }
}

}  // namespace
}  // namespace pyattr::cpu
