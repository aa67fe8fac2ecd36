// Normal projection on tensor cores, mma.sync m16n8k16, sm_80 and up: see gaussian_project.h for the matrix,
// project_kernel.cuh for the algorithm, normal_entry.cuh for the entries.
//
// Why tensor cores: making an entry takes about 55 instructions of a lane, whatever the batch is. Multiplying it by 64 samples
// takes 64 more on the CUDA cores, but 3 HMMA on tensor cores (8 tiles of samples and 3 limbs for the 8 entries that a lane has
// in an A operand; 6 HMMA for float32), which run beside the 55.
//
// Error. An entry is within 1e-6 of float64 and enters as three bfloat16 limbs, in full; products of limbs below 2^-24 of
// the whole are left out. Sums as in rademacher_project.cu, with at most 48 cut-off additions. Norm error (emulated):
// 1.3e-6. Infinities and NaNs of G do not meet limbs, see add_special.
// Extra memory: ranges * min(B, 64) * min(D, 32768) * 4 bytes, at most 64 MiB, whatever P is.
//
// Registers and spilled bytes (nvcc 13.0; sm_80 | sm_90a), for tiles of 64, 32, 8 samples:
//   float32   255, 152, 112 | 255, 154, 112   spills 168 | 264, 0, 0: sums, once per 128 columns
//   float16   254, 150,  84 | 250, 148,  86   spills 0
//   bfloat16  232, 141,  79 | 234, 146,  80   spills 0
#include "gaussian_project.h"

#include "cuda/normal_entry.cuh"
#include "cuda/project_launch.cuh"

namespace pyattr::cuda {
namespace {

struct NormalMatrix : NormalSlots {
  static constexpr const char* kOp = "gaussian_project";
  static constexpr int kLimbs = 3;  // an entry is a full float32
  static constexpr int kStepsTogether = 1;
  static constexpr int kUnrollQuarters = 1;
  static constexpr bool kFiniteOnly = true;

  struct State {};  // entries are made where they are used
  __device__ __forceinline__ static State state(const ProjectTask&, uint32_t, int64_t) { return {}; }

  // Columns column..column+3 of a block, column a multiple of 4: one Philox call.
  __device__ __forceinline__ static void entries(const ProjectTask& task, uint32_t row, int64_t block, int column,
                                                 float (&entry)[4]) {
    const uint32_t call = static_cast<uint32_t>(block * (kBlockColumns / kNormalsPerCall)) + column / kNormalsPerCall;
    const PhiloxBlock words = philox4x32_10(call, row, task.keys);
    const NormalPair first = normal_pair(words.word[0], words.word[1]);
    const NormalPair second = normal_pair(words.word[2], words.word[3]);
    entry[0] = first.even, entry[1] = first.odd, entry[2] = second.even, entry[3] = second.odd;
  }

  // Lane t's four slots of step s, in the order of the registers, are columns 16 s + 4 t .. + 3: one call a row, no
  // exchange.
  template <class Operand>
  __device__ __forceinline__ static void fragment(const ProjectTask& task, const State&, uint32_t row, int64_t block,
                                                  int step, uint32_t (&a)[kRowTiles][kLimbs][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float entry[4];
        entries(task, row + lane / 4 + 16 * m + 8 * r, block, 16 * step + 4 * (lane % 4), entry);
        uint32_t limb[4][kLimbs];
#pragma unroll
        for (int e = 0; e < 4; ++e) split_limbs(bits_of(entry[e]), limb[e]);
#pragma unroll
        for (int l = 0; l < kLimbs; ++l) {
          a[m][l][r] = pack_upper(limb[0][l], limb[1][l]);
          a[m][l][2 + r] = pack_upper(limb[2][l], limb[3][l]);
        }
      }
    }
  }
};

}  // namespace

size_t gaussian_project_workspace(const ProjectArgs& args) { return workspace_bytes(args); }

void gaussian_project(const ProjectArgs& args, void* workspace, CUstream_st* stream) {
  switch (args.dtype) {
    case Dtype::float16: return project<NormalMatrix, Float16InBFloat16>(args, workspace, stream);
    case Dtype::bfloat16: return project<NormalMatrix, BFloat16>(args, workspace, stream);
    case Dtype::float32: return project<NormalMatrix, Float32>(args, workspace, stream);
  }
}

}  // namespace pyattr::cuda
