// Y[b, j] = scale * sum_p Z[j, column_offset + p] * grads[b, p], Z standard normal, never stored.
//
// Z[j, i] comes from Philox4x32-10(counter = (i div 4, j, 0, 0), key = (seed, stream)) -> words x0..x3 by Box-Muller:
// pair q = (i div 2) mod 2 takes a = x0 or x2 and b = x1 or x3; u1 = (a + 0.5) 2^-32, u2 = b 2^-32, r = sqrt(-2 ln u1);
// even i is r cos(2 pi u2), odd i is r sin(2 pi u2). Limits: j < 2^32, i < 2^34.
#pragma once

#include "common/project_args.h"

#if defined(PYATTR_WITH_CUDA)
#include <cstddef>
struct CUstream_st;
#endif

namespace pyattr {
namespace cpu {
void gaussian_project(const ProjectArgs& args, int num_threads);
}
#if defined(PYATTR_WITH_CUDA)
namespace cuda {
size_t gaussian_project_workspace(const ProjectArgs& args);
void gaussian_project(const ProjectArgs& args, void* workspace, CUstream_st* stream);
}  // namespace cuda
#endif
}  // namespace pyattr
