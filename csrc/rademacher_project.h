// Y[b, j] = scale * sum_p S[j, column_offset + p] * grads[b, p], S in {-1, +1}^(D x P), never stored.
//
// S[j, i] is bit (i mod 32) of word (i mod 128) div 32 of Philox4x32-10(counter = (i div 128, j, 0, 0), key = (seed, stream));
// bit 1 is +1, bit 0 is -1. Limits: j < 2^32, i < 2^39.
#pragma once

#include "common/project_args.h"

#if defined(PYATTR_WITH_CUDA)
#include <cstddef>
struct CUstream_st;
#endif

namespace pyattr {
namespace cpu {
void rademacher_project(const ProjectArgs& args, int num_threads);
}
#if defined(PYATTR_WITH_CUDA)
namespace cuda {
// Bytes of device scratch that rademacher_project needs for these arguments.
size_t rademacher_project_workspace(const ProjectArgs& args);
void rademacher_project(const ProjectArgs& args, void* workspace, CUstream_st* stream);
}  // namespace cuda
#endif
}  // namespace pyattr
