// Attention and its tangents on CUDA cores, in tiles of 64 x 64 pairs.
//
// P of some rows of some heads lies in memory: written as scores, then made probabilities row by row, and read by every tangent. A
// tangent's rows are one sweep over the keys: S_dot of a tile in registers, P * S_dot through shared memory to its product with v,
// r = rowsum(P * S_dot) on the side, at last y_dot -= r y. An entry of S_dot is one chain of fused multiply-adds, an entry of
// y_dot one over all keys. Floor: the multiply-adds, of which three vector reads of shared memory feed 32.
#pragma once

#include "attention_jvp.h"
#include "common/narrow.h"
#include "cuda/device.cuh"
#include "cuda/exact_float.cuh"

namespace pyattr::cuda {

constexpr int kAttentionThreads = 128;
constexpr int kAttentionTile = 64;    // rows, keys, and columns of v
constexpr int kAttentionInner = 16;   // staged at a time
constexpr int kAttentionStride = 68;  // floats between staged rows: 16-byte aligned, and few bank conflicts
constexpr int kAttentionRows = 8, kAttentionColumns = 4;  // of a thread: 8 x 16 threads
constexpr int64_t kAttentionShared = sizeof(float) * kAttentionStride * (2 * kAttentionInner + 2 * kAttentionTile);

// Heads [first_item, first_item + items) of B H, rows [first_row, first_row + rows) of each.
struct AttentionTask {
  AttentionJvpArgs args;
  int64_t first_item, items, first_row, rows;
  float* probabilities;  // [items, rows, S]: -0.0 where a pair is forbidden
  float* exact;          // [items, rows, V], y in float32
  bool primal;           // the products give y rather than the tangents
};

// Rows and columns of one head of an operand.
struct AttentionMatrix {
  const unsigned char* data;
  Dtype dtype;
  int64_t row_stride, column_stride;

  __device__ __forceinline__ float operator()(int64_t row, int64_t column) const {
    const int64_t offset = row * row_stride + column * column_stride;
    switch (dtype) {
      case Dtype::float16: return float_of(half_to_float_bits(load_global<uint16_t>(data + 2 * offset)));
      case Dtype::bfloat16: return float_of(static_cast<uint32_t>(load_global<uint16_t>(data + 2 * offset)) << 16);
      case Dtype::float32: return load_global<float>(data + 4 * offset);
    }
    return 0.0f;
  }
};

__device__ __forceinline__ AttentionMatrix attention_matrix(const AttentionJvpArgs& args, const AttentionOperand& operand, int64_t k,
                                                            int64_t item) {
  const int64_t b = item / args.heads, h = item % args.heads;
  const int64_t offset = k * operand.strides[0] + b * operand.strides[1] + h * operand.strides[2];
  const int64_t bytes = args.dtype == Dtype::float32 ? 4 : 2;
  return {static_cast<const unsigned char*>(operand.data) + offset * bytes, args.dtype, operand.strides[3], operand.strides[4]};
}

using AttentionSums = float[kAttentionRows][kAttentionColumns];

// to[i][r] = from(row + r, inner + i), or with `across` from(inner + i, row + r); 0 beyond the ends.
__device__ __forceinline__ void attention_stage(const AttentionMatrix& from, bool across, int64_t row, int64_t rows, int64_t inner,
                                                int64_t inners, float* to) {
  const int64_t row_stride = across ? from.column_stride : from.row_stride;
  const int64_t inner_stride = across ? from.row_stride : from.column_stride;
  const bool rows_together = row_stride < inner_stride;  // neighbouring threads read neighbouring addresses
  for (int n = threadIdx.x; n < kAttentionTile * kAttentionInner; n += kAttentionThreads) {
    const int r = rows_together ? n % kAttentionTile : n / kAttentionInner;
    const int i = rows_together ? n / kAttentionTile : n % kAttentionInner;
    const bool inside = row + r < rows && inner + i < inners;
    to[i * kAttentionStride + r] = !inside ? 0.0f : across ? from(inner + i, row + r) : from(row + r, inner + i);
  }
}

// sums += a^T b for a, b [kAttentionInner][kAttentionStride] in shared memory.
__device__ __forceinline__ void attention_multiply(AttentionSums& sums, const float* a, const float* b) {
  a += threadIdx.x / 16 * kAttentionRows;
  b += threadIdx.x % 16 * kAttentionColumns;
#pragma unroll
  for (int i = 0; i < kAttentionInner; ++i, a += kAttentionStride, b += kAttentionStride) {
    float left[kAttentionRows], right[kAttentionColumns];
#pragma unroll
    for (int r = 0; r < kAttentionRows; ++r) left[r] = a[r];
#pragma unroll
    for (int c = 0; c < kAttentionColumns; ++c) right[c] = b[c];
#pragma unroll
    for (int r = 0; r < kAttentionRows; ++r) {
#pragma unroll
      for (int c = 0; c < kAttentionColumns; ++c) sums[r][c] = multiply_add(left[r], right[c], sums[r][c]);
    }
  }
}

// sums += q k^T for rows [row, rows) of q and [key, keys) of k.
__device__ __forceinline__ void attention_scores(AttentionSums& sums, const AttentionMatrix& q, int64_t row, int64_t rows,
                                                 const AttentionMatrix& k, int64_t key, int64_t keys, int64_t width) {
  float* const left = reinterpret_cast<float*>(dynamic_shared());
  float* const right = left + kAttentionInner * kAttentionStride;
  for (int64_t i = 0; i < width; i += kAttentionInner) {
    barrier();
    attention_stage(q, false, row, rows, i, width, left);
    attention_stage(k, false, key, keys, i, width, right);
    barrier();
    attention_multiply(sums, left, right);
  }
}

// Scores of the wave's pairs, without the mask.
static __global__ void __launch_bounds__(kAttentionThreads) attention_scores_kernel(const AttentionTask task) {
  const AttentionJvpArgs& args = task.args;
  const int64_t row_tiles = (task.rows + kAttentionTile - 1) / kAttentionTile;
  const int64_t key_tiles = (args.keys + kAttentionTile - 1) / kAttentionTile;
  for (int64_t tile = blockIdx.x; tile < task.items * row_tiles * key_tiles; tile += gridDim.x) {
    const int64_t item = tile / key_tiles / row_tiles, row = tile / key_tiles % row_tiles * kAttentionTile;
    const int64_t key = tile % key_tiles * kAttentionTile;
    AttentionSums sums = {};
    attention_scores(sums, attention_matrix(args, args.query, 0, task.first_item + item), task.first_row + row,
                     task.first_row + task.rows, attention_matrix(args, args.key, 0, task.first_item + item), key, args.keys,
                     args.width);
    const int64_t first_row = row + threadIdx.x / 16 * kAttentionRows, first_key = key + threadIdx.x % 16 * kAttentionColumns;
#pragma unroll
    for (int r = 0; r < kAttentionRows; ++r) {
#pragma unroll
      for (int c = 0; c < kAttentionColumns; ++c) {
        if (first_row + r >= task.rows || first_key + c >= args.keys) continue;
        task.probabilities[(item * task.rows + first_row + r) * args.keys + first_key + c] = args.scale * sums[r][c];
      }
    }
  }
}

// What is added to the score of a pair: the mask's entry, -inf where the pair is forbidden.
__device__ __forceinline__ float attention_bias(const AttentionJvpArgs& args, int64_t item, int64_t l, int64_t s) {
  if (args.causal && s > l) return -HUGE_VALF;
  if (args.mask_kind == MaskKind::none) return 0.0f;
  const int64_t offset = item / args.heads * args.mask_strides[0] + item % args.heads * args.mask_strides[1] +
                         l * args.mask_strides[2] + s * args.mask_strides[3];
  const unsigned char* const mask = static_cast<const unsigned char*>(args.mask);
  if (args.mask_kind == MaskKind::allowed) return load_global<uint8_t>(mask + offset) ? 0.0f : -HUGE_VALF;
  return load_global<float>(mask + 4 * offset);
}

// Scores to probabilities, a warp to a row; a row of nothing but -inf becomes zeros.
static __global__ void __launch_bounds__(kAttentionThreads) attention_softmax_kernel(const AttentionTask task) {
  const AttentionJvpArgs& args = task.args;
  constexpr int kWarps = kAttentionThreads / 32;
  const int lane = threadIdx.x % 32;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < task.items * task.rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    float* const scores = task.probabilities + row * args.keys;
    const int64_t item = task.first_item + row / task.rows, l = task.first_row + row % task.rows;
    float most = -HUGE_VALF, total = 0.0f;  // a NaN among the scores may be missed: its exponential is NaN
    for (int64_t s = lane; s < args.keys; s += 32) {
      const float bias = attention_bias(args, item, l, s);
      const float score = bias == -HUGE_VALF ? bias : scores[s] + bias;
      scores[s] = score;
      most = score > most ? score : most;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      const float other = float_of(shuffle_xor(bits_of(most), mask));
      most = other > most ? other : most;
    }
    const float base = most == -HUGE_VALF ? 0.0f : most;
    for (int64_t s = lane; s < args.keys; s += 32) {
      const float e = expf(scores[s] - base);
      scores[s] = e;
      total += e;
    }
    for (int mask = 16; mask > 0; mask /= 2) total += float_of(shuffle_xor(bits_of(total), mask));
    const float all = total == 0.0f ? 1.0f : total;
    for (int64_t s = lane; s < args.keys; s += 32)
      scores[s] = attention_bias(args, item, l, s) == -HUGE_VALF ? -0.0f : scores[s] / all;
  }
}

__device__ __forceinline__ void attention_give(const AttentionJvpArgs& args, void* out, int64_t index, float value) {
  switch (args.dtype) {
    case Dtype::float16: static_cast<uint16_t*>(out)[index] = narrow_float16(value); return;
    case Dtype::bfloat16: static_cast<uint16_t*>(out)[index] = narrow_bfloat16(value); return;
    case Dtype::float32: static_cast<float*>(out)[index] = value; return;
  }
}

// y, or the tangents, of the wave's rows: kGroups * 64 columns of v to a thread block.
template <int kGroups>
__global__ void __launch_bounds__(kAttentionThreads) attention_products_kernel(const AttentionTask task) {
  const AttentionJvpArgs& args = task.args;
  const int64_t S = args.keys, V = args.value_width, end = task.first_row + task.rows;
  const bool by_query = !task.primal && args.query_dot.data != nullptr, by_key = !task.primal && args.key_dot.data != nullptr;
  const AttentionOperand& moving = task.primal ? args.value : args.value_dot;  // met with P itself
  const bool moved = by_query || by_key, by_value = moving.data != nullptr;
  float* const staged = reinterpret_cast<float*>(dynamic_shared()) + kAttentionInner * kAttentionStride;
  float* const weights = staged + kAttentionInner * kAttentionStride;  // [key][row]
  float* const shares = weights + kAttentionTile * kAttentionStride;   // [key][row]
  const int row_of = threadIdx.x / 16 * kAttentionRows, column_of = threadIdx.x % 16 * kAttentionColumns;
  const int64_t row_tiles = (task.rows + kAttentionTile - 1) / kAttentionTile;
  const int64_t value_tiles = (V + kGroups * kAttentionTile - 1) / (kGroups * kAttentionTile);
  const int64_t tangents = task.primal ? 1 : args.tangents;
  for (int64_t tile = blockIdx.x; tile < tangents * task.items * value_tiles * row_tiles; tile += gridDim.x) {
    const int64_t row = tile % row_tiles * kAttentionTile, column = tile / row_tiles % value_tiles * kGroups * kAttentionTile;
    const int64_t local = tile / row_tiles / value_tiles % task.items, k = tile / row_tiles / value_tiles / task.items;
    const int64_t item = task.first_item + local;
    const AttentionMatrix q = attention_matrix(args, args.query, 0, item), key_matrix = attention_matrix(args, args.key, 0, item);
    const AttentionMatrix q_dot = attention_matrix(args, args.query_dot, k, item);
    const AttentionMatrix key_dot = attention_matrix(args, args.key_dot, k, item);
    const AttentionMatrix value = attention_matrix(args, args.value, 0, item), value_dot = attention_matrix(args, moving, k, item);
    AttentionSums sums[kGroups] = {};
    float mean[kAttentionRows] = {};
    for (int64_t key = 0; key < S; key += kAttentionTile) {
      AttentionSums scores_dot = {};
      if (by_query)
        attention_scores(scores_dot, q_dot, task.first_row + row, end, key_matrix, key, S, args.width);
      if (by_key)
        attention_scores(scores_dot, q, task.first_row + row, end, key_dot, key, S, args.width);
      barrier();  // the last tile's weights have been read
#pragma unroll
      for (int r = 0; r < kAttentionRows; ++r) {
        const bool here = row + row_of + r < task.rows;
        const float* const from = task.probabilities + (local * task.rows + row + row_of + r) * S;
#pragma unroll
        for (int c = 0; c < kAttentionColumns; ++c) {
          const int64_t s = key + column_of + c;
          const float p = here && s < S ? from[s] : -0.0f;
          const int at = (column_of + c) * kAttentionStride + row_of + r;
          shares[at] = p;
          if (!moved) continue;
          const float weight = bits_of(p) == 0x80000000u ? 0.0f : p * (args.scale * scores_dot[r][c]);
          mean[r] += weight;
          weights[at] = weight;
        }
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int64_t first = column + g * kAttentionTile;
        if (first >= V) break;
        for (int i = 0; i < kAttentionTile && key + i < S; i += kAttentionInner) {
          if (moved) {
            barrier();
            attention_stage(value, true, first, V, key + i, S, staged);
            barrier();
            attention_multiply(sums[g], weights + i * kAttentionStride, staged);
          }
          if (by_value) {
            barrier();
            attention_stage(value_dot, true, first, V, key + i, S, staged);
            barrier();
            attention_multiply(sums[g], shares + i * kAttentionStride, staged);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kAttentionRows; ++r)
      for (int mask = 8; mask > 0; mask /= 2) mean[r] += float_of(shuffle_xor(bits_of(mean[r]), mask));
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int r = 0; r < kAttentionRows; ++r) {
#pragma unroll
        for (int c = 0; c < kAttentionColumns; ++c) {
          const int64_t l = row + row_of + r, v = column + g * kAttentionTile + column_of + c;
          if (l >= task.rows || v >= V) continue;
          float* const exact = task.exact + (local * task.rows + l) * V + v;
          const int64_t index = ((k * args.batch * args.heads + item) * args.queries + task.first_row + l) * V + v;
          if (task.primal) *exact = sums[g][r][c];
          const float value_here = moved ? multiply_add(-mean[r], *exact, sums[g][r][c]) : sums[g][r][c];
          attention_give(args, task.primal ? args.y : args.y_dot, index, value_here);
        }
      }
    }
  }
}

}  // namespace pyattr::cuda
