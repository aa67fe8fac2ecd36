// Sign projection on tensor cores, mma.sync m16n8k16, sm_80 and up: see rademacher_project.h for the matrix,
// project_kernel.cuh for the algorithm, sign_fragment.cuh for the signs in registers.
//
// Error. Signs and products are exact for every input type: bfloat16 and float16 meet signs of their own type, a float32 is
// three bfloat16 limbs. What is left is summation in float32: at most 32 cut-off additions in the tensor core, then rounded
// ones, at most 512 for a chunk of 65,536 columns, 1 for a chunk, 1 for a range. Norm error under a tensor core that cuts
// off all of them (emulated): 4e-7 for float32, 6e-8 for 16-bit input.
// Extra memory: ranges * min(B, 64) * min(D, 32768) * 4 bytes, at most 64 MiB, whatever P is.
//
// Registers and spilled bytes (nvcc 13.0; sm_80 | sm_90a), for tiles of 64, 32, 8 samples:
//   float32            255, 192, 124 | 255, 182, 118   spills 8, 0, 0
//   bfloat16, float16  232, 138,  86 | 234, 142,  96   spills 0
// Instructions of a warp for 32 rows x 128 columns x 64 samples in bfloat16, from the machine code: 128 HMMA, 64 shifts, 64
// + 20 LOP3, 19 IMAD of Philox, 8 SEL + 4 SHFL, 32 LDS, and 1/8 of staging; 330 between the first HMMA and the last. An
// H100's tensor core takes at least 4 cycles for an HMMA, so 2 warps per scheduler leave it 1024 cycles for 2 * 330
// instructions: bound by HMMA, which mma.sync issues at about 60% of what wgmma reaches. At 8 samples a tile it is bound by
// signs: about 230 instructions for 4096 of them, 1.8 per sign and lane against the 1.4 of shift, LOP3 and Philox alone.
#include "rademacher_project.h"

#include "cuda/project_launch.cuh"

namespace pyattr::cuda {
namespace {

struct SignMatrix : SignSlots {
  static constexpr const char* kOp = "rademacher_project";
  static constexpr int kLimbs = 1;            // a sign is exact in any type
  static constexpr int kStepsTogether = 2;
  static constexpr int kUnrollQuarters = 4;   // the shifts become immediate
  static constexpr bool kFiniteOnly = false;  // a sign times an infinity is an infinity

  // This lane's word of the block's signs for rows g, g + 8, g + 16, g + 24, with g = lane / 4.
  struct State {
    uint32_t word[2 * kRowTiles];
  };

  // The lanes t of a quad make one call each, for row g + 8 t; then the quad transposes its 4 x 4 words.
  __device__ __forceinline__ static State state(const ProjectTask& task, uint32_t row, int64_t block) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    const PhiloxBlock call = philox4x32_10(static_cast<uint32_t>(block), row + lane / 4 + 8 * t, task.keys);
    uint32_t w[4] = {call.word[0], call.word[1], call.word[2], call.word[3]};
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) exchange(w[pair], w[pair + 1], t & 1, 1);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) exchange(w[pair], w[pair + 2], t & 2, 2);
    return {{w[0], w[1], w[2], w[3]}};
  }

  template <class Operand>
  __device__ __forceinline__ static void fragment(const ProjectTask&, const State& state, uint32_t, int64_t, int step,
                                                  uint32_t (&a)[kRowTiles][1][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[m][0][i] = expand_signs(state.word[2 * m + i % 2], 2 * step + i / 2, Operand::kMinusOnes);
      }
    }
  }

 private:
  // Swap `high` of the lane whose bit is clear with `low` of the lane whose bit is set.
  __device__ __forceinline__ static void exchange(uint32_t& low, uint32_t& high, bool bit, int mask) {
    const uint32_t received = shuffle_xor(bit ? low : high, mask);
    (bit ? low : high) = received;
  }
};

}  // namespace

size_t rademacher_project_workspace(const ProjectArgs& args) { return workspace_bytes(args); }

void rademacher_project(const ProjectArgs& args, void* workspace, CUstream_st* stream) {
  switch (args.dtype) {
    case Dtype::float16: return project<SignMatrix, Float16>(args, workspace, stream);
    case Dtype::bfloat16: return project<SignMatrix, BFloat16>(args, workspace, stream);
    case Dtype::float32: return project<SignMatrix, Float32>(args, workspace, stream);
  }
}

}  // namespace pyattr::cuda
