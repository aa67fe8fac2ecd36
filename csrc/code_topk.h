// The k codes of largest or smallest v(c) = max(c^T M c, 0) / (n - h)^2, of n bits c_i of which h are set.
//
// M is integer, and c^T M c is summed exactly (of the complement instead where bit n - 1 is set, so that a code and its
// complement tie). Most codes never get that far: |R c|, with R^T R = M but for `slack` in c^T M c, bounds v. What is in the way of
// equality is rounding, whose norm is at most `error`.
#pragma once

#include <cstdint>

#if defined(PYATTR_WITH_CUDA)
struct CUstream_st;
#endif

namespace pyattr {

constexpr int kCodeMembers = 64;  // n at most

// On the CPU, rows of 16 lanes hold the sums of R's columns, times `scale`, over the bits of pieces of a code.
constexpr int kCodePiece = 5;                      // bits
constexpr int kCodeEntries = 1 << kCodePiece;      // rows of a plane, one for each value of a piece
constexpr int kCodeLanes = 16;                     // rows of R in a plane

constexpr int code_pieces(int members) { return (members + kCodePiece - 1) / kCodePiece; }
// R is upper triangular: a piece reaches no further than the rows of its own bits.
constexpr int code_planes_of(int piece) {
  const int rows = kCodePiece * (piece + 1) < kCodeMembers ? kCodePiece * (piece + 1) : kCodeMembers;
  return (rows + kCodeLanes - 1) / kCodeLanes;
}
constexpr int code_planes_before(int piece) { return piece == 0 ? 0 : code_planes_before(piece - 1) + code_planes_of(piece - 1); }

struct CodeTopkArgs {
  const uint64_t* codes;   // [N]
  int64_t num_codes;       // N
  int64_t first;           // the index of codes[0]
  int members;             // n, 2 to 64
  const int64_t* matrix;   // [n, n], M; n^2 entries add up to less than 2^63
  const int16_t* tables;   // [planes, 32, 16], planes = code_planes_before(code_pieces(n)); |sum of rows|^2 < 2^31
  double scale, error, slack;
  bool largest;
  int64_t k;               // 1 or more
  int64_t found;           // how many of values and indices are there already, of codes before `first`; at most k
  double* values;          // [k], v; best first on return
  int64_t* indices;        // [k]; equal values by lowest index
};

struct CodesFound {
  int64_t found;
  int64_t bad;  // the first index of a code with a bit from n on, or with all n set; then the rest is of no use. Or -1
};

namespace cpu {
CodesFound code_topk(const CodeTopkArgs& args, int num_threads);
}  // namespace cpu

// On a GPU, the codes whose |R c|^2 reaches a limit; the selection among them is the caller's. R times a scale is an integer matrix,
// 256 * rows[0] + rows[1]; its sums over a code are exact and below 2^22 in magnitude, and |R c|^2 is summed in float32, from squares
// rounded to nearest.
struct CodeFlagsArgs {
  const uint64_t* codes;  // [N]
  int64_t num_codes;      // N
  int members;            // n, 2 to 64
  const int8_t* rows;     // [2, 64, 64], zero where row or column is beyond n and below the diagonal
  const float* limits;    // [65], by h
  bool largest;           // pass at the limit or above, else at it or below
  uint8_t* flags;         // [ceil(N / 8)]: bit i of byte j, code 8 j + i passes, or has a bit from n on
};

#if defined(PYATTR_WITH_CUDA)
namespace cuda {
void code_topk(const CodeFlagsArgs& args, CUstream_st* stream);
}  // namespace cuda
#endif

}  // namespace pyattr
