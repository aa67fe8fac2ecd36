// Y = G M^T for a random matrix M [D, P] made in registers: what the sign and the normal matrix share.
//
// A thread block owns kTileRows rows of M (outputs), up to 64 samples and one range of columns. It walks the range in
// blocks of 128 columns. While a block is multiplied, the next is turned from raw to operands and the one after that is
// copied (cp.async):
//   global --copy_block--> raw[2] --stage_block--> operand[2] --mma--> accumulators
// with one barrier per block. A warp makes 32 rows of M as A operands in registers and meets every sample with each of
// them.
//
// Order of summation, the same for any device, batch and repetition, since each sample has its own accumulators: products
// inside the tensor core; after kDrainBlocks blocks these are added to float32 sums in registers; after 65,536 columns
// those are added to the range's partial result in the workspace; reduce_kernel adds the ranges. All in ascending order.
// The ranges depend on (P, column_offset, D) alone.
#pragma once

#include <type_traits>

#include "common/project_args.h"
#include "cuda/device.cuh"
#include "cuda/limbs.cuh"
#include "cuda/sign_fragment.cuh"
#include "cuda/stage_layout.cuh"
#include "cuda/summation.cuh"

namespace pyattr::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRowTiles = 2;  // of 16 rows, per warp: one Philox call of the sign matrix per lane and block
constexpr int kWarpRows = 16 * kRowTiles;
constexpr int kTileRows = kWarpRows * kWarps;  // 256
constexpr int64_t kChunkBlocks = kChunkColumns / kBlockColumns;

enum class Copy { kAsync16, kAsync4, kElements };  // what alignment and strides of G allow

// What one launch computes: up to 8 * kSampleTiles samples and a slab of rows.
struct ProjectTask {
  const unsigned char* grads;  // [num_samples, num_columns], the first sample of this launch
  int num_samples;
  Copy copy;
  int64_t num_columns;
  int64_t sample_stride;  // elements
  int64_t column_stride;  // elements
  int64_t column_offset;
  int64_t first_block;    // of the matrix: column_offset / 128
  int64_t num_blocks;
  int64_t range_blocks;
  int64_t first_row;      // of the matrix
  int64_t num_rows;
  int64_t row_tiles;      // thread blocks per range
  float* partial;         // [ranges, num_samples, num_rows]
  PhiloxKeys keys;
};

// Element types: as float32 bits (or, where one limb holds the element, its 16 bits in the upper half), in kLimbs limbs.
struct Float32 {
  static constexpr int kBytes = 4, kLimbs = 3;
  using Operand = BFloat16Operand;
  __device__ __forceinline__ static uint32_t bits(uint32_t raw) { return raw; }
};
struct BFloat16 {
  static constexpr int kBytes = 2, kLimbs = 1;
  using Operand = BFloat16Operand;
  __device__ __forceinline__ static uint32_t bits(uint32_t raw) { return raw << 16; }
};
struct Float16 {
  static constexpr int kBytes = 2, kLimbs = 1;
  using Operand = Float16Operand;
  __device__ __forceinline__ static uint32_t bits(uint32_t raw) { return raw << 16; }
};
struct Float16InBFloat16 {
  static constexpr int kBytes = 2, kLimbs = 2;
  using Operand = BFloat16Operand;
  __device__ __forceinline__ static uint32_t bits(uint32_t raw) { return half_to_float_bits(raw); }
};

// Limb products that count, of kLimbs of the matrix and of the element: that of limbs k and l is 2^(-8 (k + l)) of the
// whole, and from k + l = 3 on it is below float32.
template <class Matrix, class Element>
constexpr int num_products() {
  int count = 0;
  for (int k = 0; k < Matrix::kLimbs; ++k) {
    for (int l = 0; l < Element::kLimbs; ++l) count += k + l < 3;
  }
  return count;
}

// A tensor core cuts its sums off where float32 arithmetic rounds them, so that errors add up instead of cancelling: at
// most 32 (one product) to 48 (six products) additions happen there.
template <class Matrix, class Element>
constexpr int kDrainBlocks = num_products<Matrix, Element>() == 1 ? 4 : 1;

template <class Element, int kSamples>
struct SharedLayout {
  static constexpr int kRaw = kSamples * kBlockColumns * Element::kBytes;  // bytes
  static constexpr int kLimb = kSamples * kBlockColumns * 2;
  static constexpr int kOperand = kLimb * Element::kLimbs;
  static constexpr int kTotal = 2 * (kRaw + kOperand);
};

// Column p of G that multiplies column 0 of a block of the matrix; negative in the first block when column_offset is
// ragged.
__device__ __forceinline__ int64_t first_column(const ProjectTask& task, int64_t block) {
  return block * kBlockColumns - task.column_offset;
}

// Start copying one block of G to raw. Columns outside [0, P) become zeros; rows past num_samples are zero already.
template <class Element, int kSamples>
__device__ __forceinline__ void copy_block(const ProjectTask& task, int64_t block, unsigned char* raw) {
  constexpr int kChunkElements = 16 / Element::kBytes, kRowChunks = kBlockColumns / kChunkElements;
  constexpr int kRowBytes = kBlockColumns * Element::kBytes, kPassRows = kThreads / kRowChunks;
  static_assert(kPassRows % 2 == 0, "raw_offset depends on the parity of the sample");
  using Word = std::conditional_t<Element::kBytes == 4, uint32_t, uint16_t>;
  const int64_t first = first_column(task, block);
  const bool inside = first >= 0 && first + kBlockColumns <= task.num_columns;
  const int64_t step = task.column_stride * Element::kBytes;  // bytes from column to column
  const int64_t pass = task.sample_stride * Element::kBytes * kPassRows;
  const int chunk = threadIdx.x % kRowChunks;
  int sample = threadIdx.x / kRowChunks;
  const int64_t column = first + chunk * kChunkElements;
  unsigned char* to = raw + raw_offset<Element::kBytes>(sample, chunk);
  const unsigned char* from = task.grads + sample * task.sample_stride * Element::kBytes + column * step;
  if (inside && task.copy == Copy::kAsync16) {
    for (; sample < task.num_samples; sample += kPassRows, to += kPassRows * kRowBytes, from += pass) {
      copy_async_16(to, from);
    }
  } else if (inside && task.copy == Copy::kAsync4) {
    for (; sample < task.num_samples; sample += kPassRows, to += kPassRows * kRowBytes, from += pass) {
      for (int w = 0; w < 4; ++w) copy_async_4(to + 4 * w, from + w * (kChunkElements / 4) * step);
    }
  } else {
    for (; sample < task.num_samples; sample += kPassRows, to += kPassRows * kRowBytes, from += pass) {
      for (int e = 0; e < kChunkElements; ++e) {
        const bool valid = column + e >= 0 && column + e < task.num_columns;
        reinterpret_cast<Word*>(to)[e] = valid ? load_global<Word>(from + e * step) : Word{0};
      }
    }
  }
}

// Four neighbouring columns of one sample, as Element::bits.
template <class Element>
__device__ __forceinline__ void load_columns(const unsigned char* raw, int sample, int column, uint32_t (&bits)[4]) {
  const unsigned char* from = raw + raw_offset<Element::kBytes>(sample, column * Element::kBytes / 16);
  if constexpr (Element::kBytes == 4) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    bits[0] = Element::bits(words.x), bits[1] = Element::bits(words.y);
    bits[2] = Element::bits(words.z), bits[3] = Element::bits(words.w);
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(from + (column & 4) * 2);
    bits[0] = Element::bits(words.x & 0xFFFFu), bits[1] = Element::bits(words.x >> 16);
    bits[2] = Element::bits(words.y & 0xFFFFu), bits[3] = Element::bits(words.y >> 16);
  }
}

__device__ __forceinline__ bool finite(uint32_t bits) { return (bits & 0x7F800000u) != 0x7F800000u; }

// Turn one block from raw to operands. Returns whether this thread met a number that the matrix keeps out of the tensor
// cores.
template <class Matrix, class Element, int kSamples>
__device__ __forceinline__ bool stage_block(const unsigned char* raw, unsigned char* operand) {
  bool found = false;
#pragma unroll (Element::kLimbs == 1 ? 4 : 1)  // registers are short where an element has several limbs
  for (int i = 0; i < (kSamples * 16 + kThreads - 1) / kThreads; ++i) {
    const int index = i * kThreads + threadIdx.x;
    if (kSamples * 16 < kThreads && index >= kSamples * 16) break;
    const StageUnit unit = stage_unit<kSamples>(index);
    uint32_t limb[2][4][Element::kLimbs];
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      uint32_t bits[4];
      load_columns<Element>(raw, unit.sample, Matrix::group_column(unit.lane, unit.quarter, group), bits);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (Matrix::kFiniteOnly && !finite(bits[e])) bits[e] = 0, found = true;
        split_limbs(bits[e], limb[group][e]);
      }
    }
#pragma unroll
    for (int l = 0; l < Element::kLimbs; ++l) {
      uint32_t word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        word[j] = pack_upper(limb[Matrix::pair_group(j, 0)][Matrix::pair_element(j, 0)][l],
                             limb[Matrix::pair_group(j, 1)][Matrix::pair_element(j, 1)][l]);
      }
      const int offset = operand_offset<kSamples>(unit.sample, unit.lane, unit.quarter);
      *reinterpret_cast<uint4*>(operand + l * SharedLayout<Element, kSamples>::kLimb + offset) =
          make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
  return found;
}

template <int kSampleTiles>
using Accumulators = float[kRowTiles][kSampleTiles][4];

// One block: accumulators += 32 rows of the matrix * operands.
template <class Matrix, class Element, int kSampleTiles>
__device__ __forceinline__ void multiply_block(const ProjectTask& task, const typename Matrix::State& state, uint32_t row,
                                               int64_t block, const unsigned char* operand,
                                               Accumulators<kSampleTiles>& sums) {
  constexpr int kSamples = 8 * kSampleTiles;
  // Sample tiles whose products interleave, to hide their latency; several limbs leave no registers for two.
  constexpr int kTogether = kSampleTiles > 1 && Element::kLimbs == 1 ? 2 : 1;
  const int lane = threadIdx.x % 32;
#pragma unroll Matrix::kUnrollQuarters
  for (int quarter = 0; quarter < kQuarters; ++quarter) {
#pragma unroll
    for (int first = 0; first < 2; first += Matrix::kStepsTogether) {
      uint32_t a[Matrix::kStepsTogether][kRowTiles][Matrix::kLimbs][4];
#pragma unroll
      for (int s = 0; s < Matrix::kStepsTogether; ++s) {
        Matrix::template fragment<typename Element::Operand>(task, state, row, block, 2 * quarter + first + s, a[s]);
      }
#pragma unroll
      for (int tile = 0; tile < kSampleTiles; tile += kTogether) {
        uint4 b[kTogether][Element::kLimbs];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const int offset = operand_offset<kSamples>(8 * (tile + i) + lane / 4, lane % 4, quarter);
#pragma unroll
          for (int l = 0; l < Element::kLimbs; ++l) {
            b[i][l] = *reinterpret_cast<const uint4*>(operand + l * SharedLayout<Element, kSamples>::kLimb + offset);
          }
        }
#pragma unroll
        for (int s = 0; s < Matrix::kStepsTogether; ++s) {
#pragma unroll
          for (int order = 0; order < 3; ++order) {
#pragma unroll
            for (int l = 0; l < Element::kLimbs; ++l) {
              const int k = order - l;  // limb of the matrix
              if (k < 0 || k >= Matrix::kLimbs) continue;
#pragma unroll
              for (int i = 0; i < kTogether; ++i) {
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m) {
                  const uint4& words = b[i][l];
                  Element::Operand::mma(sums[m][tile + i], a[s][m][k], first + s ? words.z : words.x,
                                        first + s ? words.w : words.y);
                }
              }
            }
          }
        }
      }
    }
  }
}

// The infinities and NaNs that stage_block kept out, added one by one: an entry times an infinity is an infinity, but a
// limb of the entry may be 0, and 0 times an infinity is a NaN. Rare, so small rather than fast.
template <class Matrix, class Element, int kSampleTiles>
__device__ __forceinline__ void add_special(const ProjectTask& task, uint32_t row, int64_t block, const unsigned char* raw,
                                            Accumulators<kSampleTiles>& sums) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int index = 0; index < kRowTiles * kSampleTiles * 4; ++index) {  // [m][tile][c] of sums
    const int m = index / (4 * kSampleTiles), tile = index / 4 % kSampleTiles, c = index % 4;
    bool found = false;
    float value = 0.0f;
#pragma unroll 1
    for (int column = 0; column < kBlockColumns; column += 4) {
      uint32_t bits[4];
      load_columns<Element>(raw, 8 * tile + 2 * (lane % 4) + c % 2, column, bits);
      if (finite(bits[0]) && finite(bits[1]) && finite(bits[2]) && finite(bits[3])) continue;
      found = true;
      float entry[4];
      Matrix::entries(task, row + 16 * m + lane / 4 + 8 * (c / 2), block, column, entry);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!finite(bits[e])) value += entry[e] * float_of(bits[e]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles * kSampleTiles * 4; ++i) {  // registers have no address
      if (i == index && found) sums[i / (4 * kSampleTiles)][i / 4 % kSampleTiles][i % 4] += value;
    }
  }
}

template <class Matrix, class Element, int kSampleTiles>
__global__ void __launch_bounds__(kThreads, 1) project_kernel(const ProjectTask task) {
  constexpr int kSamples = 8 * kSampleTiles;
  using Shared = SharedLayout<Element, kSamples>;
  unsigned char* const shared = dynamic_shared();
  unsigned char* const operands = shared + 2 * Shared::kRaw;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row_in_slab = blockIdx.x % task.row_tiles * kTileRows + warp * kWarpRows;
  const uint32_t row = static_cast<uint32_t>(task.first_row + row_in_slab);
  const bool active = row_in_slab < task.num_rows;  // a warp without rows only stages
  const int64_t range = blockIdx.x / task.row_tiles;
  const int64_t begin = range * task.range_blocks;  // blocks counted from task.first_block
  const int64_t end = begin + task.range_blocks < task.num_blocks ? begin + task.range_blocks : task.num_blocks;

  for (int i = threadIdx.x; i < 2 * Shared::kRaw / 16; i += kThreads) {
    // The bits of raw_offset that pick a chunk stay within a sample.
    const int sample = i % (Shared::kRaw / 16) / (kBlockColumns * Element::kBytes / 16);
    if (sample >= task.num_samples) *reinterpret_cast<uint4*>(shared + 16 * i) = make_uint4(0, 0, 0, 0);
  }
  copy_block<Element, kSamples>(task, task.first_block + begin, shared);
  copy_async_wait_all();
  barrier();
  if (begin + 1 < end) copy_block<Element, kSamples>(task, task.first_block + begin + 1, shared + Shared::kRaw);
  bool found = stage_block<Matrix, Element, kSamples>(shared, operands);
  typename Matrix::State state = Matrix::state(task, row, task.first_block + begin);

  Accumulators<kSampleTiles> products = {}, sums = {};
  const auto drain = [&] {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int tile = 0; tile < kSampleTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          sums[m][tile][c] += products[m][tile][c];
          products[m][tile][c] = 0.0f;
        }
      }
    }
  };
  const auto flush = [&](bool first_chunk) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int tile = 0; tile < kSampleTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int sample = 8 * tile + 2 * (lane % 4) + c % 2;
          const int64_t r = row_in_slab + 16 * m + lane / 4 + 8 * (c / 2);
          if (sample < task.num_samples && r < task.num_rows) {
            float& to = task.partial[(range * task.num_samples + sample) * task.num_rows + r];
            to = first_chunk ? sums[m][tile][c] : to + sums[m][tile][c];
          }
          sums[m][tile][c] = 0.0f;
        }
      }
    }
  };

  for (int64_t block = begin; block < end; ++block) {
    const int slot = static_cast<int>((block - begin) & 1);
    unsigned char* const raw = shared + slot * Shared::kRaw;
    unsigned char* const next_raw = shared + (slot ^ 1) * Shared::kRaw;
    copy_async_wait_all();  // next_raw is in
    // After the barrier this block's operands are whole, and the previous block's and this block's raw are free.
    if constexpr (!Matrix::kFiniteOnly) {
      barrier();
    } else if (barrier_or(found)) {
      if (active) add_special<Matrix, Element, kSampleTiles>(task, row, task.first_block + block, raw, sums);
      barrier();
    }
    if (block + 2 < end) copy_block<Element, kSamples>(task, task.first_block + block + 2, raw);
    found = block + 1 < end &&
            stage_block<Matrix, Element, kSamples>(next_raw, operands + (slot ^ 1) * Shared::kOperand);
    if (active) {
      const typename Matrix::State now = state;
      state = Matrix::state(task, row, task.first_block + block + 1);
      multiply_block<Matrix, Element, kSampleTiles>(task, now, row, task.first_block + block,
                                                    operands + slot * Shared::kOperand, products);
      const int64_t done = block - begin + 1;
      const bool last = block + 1 == end;
      if (last || done % kDrainBlocks<Matrix, Element> == 0) drain();
      if (last || done % kChunkBlocks == 0) flush(done <= kChunkBlocks);
    }
  }
}

}  // namespace pyattr::cuda
