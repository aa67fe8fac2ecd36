// Attention and its derivatives along K tangents: y = P v, y_dot = (P * (S_dot - rowsum(P * S_dot))) v + P v_dot with
// S = scale q k^T + mask, P = softmax(S) over keys, S_dot = scale (q_dot k^T + q k_dot^T). P is computed once for all tangents.
//
// Forbidden pairs (mask false or -inf, keys after the query with `causal`) have weight and tangent 0, and so has every pair of a row
// whose scores are all -inf. Sums, P and P_dot are float32 whatever the dtype; y and y_dot are rounded once.
//
// Work: 2 L S (2 E + 2 V) operations a tangent where all three are given, and 2 L S (E + V) once; with K tangents one at a time, as
// dual numbers, it is 6 products for each against 4 + 2 / K here.
#pragma once

#include <cstdint>

#include "common/project_args.h"

#if defined(PYATTR_WITH_CUDA)
#include <cstddef>
struct CUstream_st;
#endif

namespace pyattr {

enum class MaskKind : int32_t { none = 0, allowed = 1, added = 2 };  // allowed: one byte each, 0 forbids; added: float32

// [K, B, H, rows, columns] of the dtype; a primal's K stride is not used. A tangent of zeros is a null address.
struct AttentionOperand {
  const void* data;
  int64_t strides[5];  // elements
};

struct AttentionJvpArgs {
  AttentionOperand query, key, value;              // [B, H, L, E], [B, H, S, E], [B, H, S, V]
  AttentionOperand query_dot, key_dot, value_dot;  // the same with K before
  Dtype dtype;
  const void* mask;         // [B, H, L, S]
  MaskKind mask_kind;
  int64_t mask_strides[4];  // elements
  int64_t tangents;         // K
  int64_t batch, heads;     // B, H
  int64_t queries, keys;    // L, S
  int64_t width;            // E
  int64_t value_width;      // V
  bool causal;
  float scale;
  void* y;                  // [B, H, L, V] of the dtype, contiguous
  void* y_dot;              // [K, B, H, L, V] likewise
};

namespace cpu {
void attention_jvp(const AttentionJvpArgs& args, int num_threads);
}  // namespace cpu
#if defined(PYATTR_WITH_CUDA)
namespace cuda {
void attention_jvp(const AttentionJvpArgs& args, CUstream_st* stream);
}  // namespace cuda
#endif
}  // namespace pyattr
