// Y[b, j] = scale * sum_p (-1)^popcount(r_j & p) * s_p * grads[b, p]: D rows of a Hadamard matrix with random signs, never stored.
//
// r_j = permute_bits(j) of [0, N) (common/permutation.h), N the first power of two from P on; s_p is bit (p mod 32) of word
// (p mod 128) div 32 of Philox4x32-10(counter = (p div 128, 0, 4, 0), key = (seed, stream)); bit 1 is +1, bit 0 is -1.
// Limits: D <= N, P <= 2^39. ProjectArgs::column_offset is 0: the rows span the whole vector.
//
// Every backend works on blocks of 2^m columns: with l the low m bits of r_j and h the others, block c adds
// (-1)^popcount(h & c) times entry l of its own Walsh-Hadamard transform to Y[b, j].
#pragma once

#include "common/permutation.h"
#include "common/project_args.h"

#if defined(PYATTR_WITH_CUDA)
#include <cstddef>
struct CUstream_st;
#endif

namespace pyattr {

constexpr uint32_t kHadamardSignWord = 4;  // third counter word of the signs
constexpr int64_t kHadamardMaxColumns = int64_t{1} << 39;

// The number of bits of 0 .. n - 1.
PYATTR_HOST_DEVICE int hadamard_bits(int64_t n) {
  int bits = 0;
  while (bits < 62 && (int64_t{1} << bits) < n) ++bits;
  return bits;
}

namespace cpu {
void hadamard_project(const ProjectArgs& args, int num_threads);
}
#if defined(PYATTR_WITH_CUDA)
namespace cuda {
// Bytes of device scratch that hadamard_project needs for these arguments.
size_t hadamard_project_workspace(const ProjectArgs& args);
void hadamard_project(const ProjectArgs& args, void* workspace, CUstream_st* stream);
}  // namespace cuda
#endif
}  // namespace pyattr
