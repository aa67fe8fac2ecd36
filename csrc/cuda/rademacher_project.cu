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
