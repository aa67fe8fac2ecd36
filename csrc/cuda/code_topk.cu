// Codes against their limits on integer tensor cores, mma.sync m16n8k32, sm_80 and up: see code_topk.h for the form.
//
// A warp holds the whole matrix in registers, at most 48 of them: 16 rows meet the bits of 8 codes at a time, and rows 16 m to 16 m + 15
// of a triangular matrix only the 32-bit halves of a code from bit 16 m on. Four bits become four bytes by a multiplication. For
// n = 64 that is 12 products of 4096 multiply-adds for 8 codes, 2.3 cycles of a multiprocessor for a code where mma.sync reaches 60% of
// an H100's integer peak; conversions to float32, squares and shuffles are about as much again.
#include "code_topk.h"

#include <algorithm>

#include "cuda/exact_float.cuh"
#include "cuda/reduce.cuh"

namespace pyattr::cuda {
namespace {

constexpr int kCodeThreads = 256;
constexpr int kCodeTile = 8;              // codes
constexpr int64_t kCodeMostBlocks = 2048;  // of a launch: tiles are taken in turns

__device__ __forceinline__ uint32_t bytes_of_bits(uint32_t bits) { return (bits & 15) * 0x00204081u & 0x01010101u; }

__device__ __forceinline__ int weight_of(uint64_t code) {
  code -= code >> 1 & 0x5555555555555555u;
  code = (code & 0x3333333333333333u) + (code >> 2 & 0x3333333333333333u);
  return static_cast<int>(((code + (code >> 4)) & 0x0F0F0F0F0F0F0F0Fu) * 0x0101010101010101u >> 56);
}

__device__ __forceinline__ float sum_of_rows(float value) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) value = add(value, float_of(shuffle_xor(bits_of(value), mask)));
  return value;
}

// kTiles tiles of 16 rows.
template <int kTiles>
__global__ __launch_bounds__(kCodeThreads) void code_topk_kernel(const CodeFlagsArgs args) {
  constexpr int kHalves = (kTiles + 1) / 2;
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  uint32_t rows[2][kTiles][kHalves][4];
#pragma unroll
  for (int limb = 0; limb < 2; ++limb) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = m / 2; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * m + g + 8 * (i % 2), column = 32 * half + 4 * t + 16 * (i / 2);
          rows[limb][m][half][i] = *reinterpret_cast<const uint32_t*>(args.rows + (limb * kCodeMembers + row) * kCodeMembers + column);
        }
      }
    }
  }
  const uint64_t outside = args.members < 64 ? ~uint64_t{0} << args.members : 0;
  const int64_t tiles = (args.num_codes + kCodeTile - 1) / kCodeTile;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kCodeThreads / 32);
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * (kCodeThreads / 32) + threadIdx.x / 32; tile < tiles; tile += stride) {
    const int64_t first = tile * kCodeTile;
    const auto code_at = [&](int64_t place) {
      return place < args.num_codes ? load_global<uint64_t>(args.codes + place) : uint64_t{0};
    };
    const uint64_t code = code_at(first + g);
    uint32_t columns[kHalves][2];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const uint32_t word = static_cast<uint32_t>(code >> 32 * half);
      columns[half][0] = bytes_of_bits(word >> 4 * t);
      columns[half][1] = bytes_of_bits(word >> (16 + 4 * t));
    }
    float squares[2] = {0.0f, 0.0f};  // of codes 2 t and 2 t + 1
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      int32_t high[4] = {0, 0, 0, 0}, low[4] = {0, 0, 0, 0};
#pragma unroll
      for (int half = m / 2; half < kHalves; ++half) {
        mma_bytes(high, rows[0][m][half], columns[half][0], columns[half][1]);
        mma_bytes(low, rows[1][m][half], columns[half][0], columns[half][1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = static_cast<float>(256 * high[i] + low[i]);
        squares[i % 2] = multiply_add(sum, sum, squares[i % 2]);
      }
    }
    uint32_t passed = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t place = first + 2 * t + i;
      const uint64_t own = code_at(place);
      const float total = sum_of_rows(squares[i]), limit = args.limits[weight_of(own)];
      const bool passes = (args.largest ? total >= limit : total <= limit) || (own & outside) != 0;
      if (passes && place < args.num_codes) passed |= 1u << (2 * t + i);
    }
    passed |= shuffle_xor(passed, 1);
    passed |= shuffle_xor(passed, 2);
    if (lane == 0) args.flags[tile] = static_cast<uint8_t>(passed);
  }
}

template <int kTiles>
void launch(const CodeFlagsArgs& args, cudaStream_t stream) {
  constexpr int64_t kCodes = kCodeTile * (kCodeThreads / 32);
  const dim3 grid(static_cast<unsigned>(std::min((args.num_codes + kCodes - 1) / kCodes, kCodeMostBlocks)));
  CodeFlagsArgs task = args;
  void* arguments[] = {&task};
  check(cudaLaunchKernel(code_topk_kernel<kTiles>, grid, dim3(kCodeThreads), arguments, 0, stream), "code_topk", "launching the kernel");
}

}  // namespace

void code_topk(const CodeFlagsArgs& args, CUstream_st* stream) {
  if (args.num_codes == 0) return;
  switch ((args.members + 15) / 16) {
    case 1: return launch<1>(args, stream);
    case 2: return launch<2>(args, stream);
    case 3: return launch<3>(args, stream);
    default: return launch<4>(args, stream);
  }
}

}  // namespace pyattr::cuda
