// Y[b, j] = scale * sum_p M[j, column_offset + p] * grads[b, p], M [D x P] with `nonzeros` entries +-1 per column, never stored.
//
// Outputs are D / W blocks of W lanes (sketch_lanes); nonzero r falls into the blocks of its group (sketch_group), of which there
// are G. Column i is lane i mod W of block q = i div W, the m-th of tile t: q = t G + m. Its row is
// W * (first + (a m + b) mod G) + (lane xor x), with a, b, x the tile's (sketch_tile). Its sign is bit (i mod 32) of word
// (i mod 128) div 32 of Philox4x32-10(counter = (i div 128, r, 1, 0), key = (seed, stream)); bit 1 is +1, bit 0 is -1.
// Within a tile the map is one to one. Limits: D <= 2^31, i < 2^39, nonzeros <= 8.
#pragma once

#include "common/project_args.h"

#if defined(PYATTR_WITH_CUDA)
#include <cstddef>
struct CUstream_st;
#endif

namespace pyattr {

struct SketchArgs : ProjectArgs {
  int32_t nonzeros;
};

namespace cpu {
void sparse_project(const SketchArgs& args, int num_threads);

// The transpose: grads is [B, D], of the strides given, out is [B, P].
void sparse_project_transpose(const SketchArgs& args, int num_threads);
}  // namespace cpu
#if defined(PYATTR_WITH_CUDA)
namespace cuda {
size_t sparse_project_workspace(const SketchArgs& args);
void sparse_project(const SketchArgs& args, void* workspace, CUstream_st* stream);
}  // namespace cuda
#endif
}  // namespace pyattr
