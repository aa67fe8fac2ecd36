// The sparse projection of a layer's per-sample weight gradients, which are never written to memory.
#pragma once

#include "common/layer_args.h"
#include "sparse_project.h"

namespace pyattr::cpu {

// out[b, j] += sum over the weight's entries p of M[j, column_offset + p] * G_b[p]. Of `sketch`, grads and what describes them, and
// the scale, are not used.
void layer_sketch(const LayerArgs& layer, const SketchArgs& sketch, int num_threads);

// out[b, o, :] (+)= row o of sample b's gradient, of row_columns() entries; samples are out_stride apart.
void layer_gradient(const LayerArgs& layer, float* out, int64_t out_stride, bool add, int num_threads);

// Some samples of the layer and a part of its columns: sums[b - sample_begin, :] += the projection of columns [begin, end) of every
// row of the weight, of all groups.
struct LayerTask {
  const LayerArgs* layer;
  const SketchArgs* sketch;
  int64_t sample_begin, sample_end;
  int64_t column_begin, column_end;  // of a row
  float* sums;                       // [sample_end - sample_begin, D]
};

// Rows [begin, end) of a group, of one sample.
struct RowsTask {
  const LayerArgs* layer;
  int64_t sample, group, begin, end;
  float* out;  // [end - begin, row_columns()]
  bool add;
};

using RowsKernel = void (*)(const RowsTask&);
using LayerKernel = void (*)(const LayerTask&);

}  // namespace pyattr::cpu
