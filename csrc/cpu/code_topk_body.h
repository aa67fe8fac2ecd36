// A block of codes against the limits; included by one file per SIMD level, internal linkage throughout.
//
// A code of n = 64 bits takes 34 rows of 16 lanes from 33 KB of tables, which stay in the L1 cache of 32 KB but for little; pieces of 8
// bits would take 20 rows from 164 KB, each a miss. Squares add up in int32.
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/code_block.h"

namespace pyattr::cpu {
namespace {

// The row of a code's piece, in bytes from the start of a plane.
constexpr int kRowBytes = kCodeLanes * 2, kPlaneBytes = kCodeEntries * kRowBytes;
template <int kPiece>
inline uint64_t row_offset(uint64_t code) {
  constexpr int kShift = kCodePiece * kPiece - 5;  // 2^5 = kRowBytes
  return (kShift < 0 ? code << (kShift < 0 ? -kShift : 0) : code >> (kShift < 0 ? 0 : kShift)) & (kPlaneBytes - kRowBytes);
}

#if defined(__AVX2__)

template <int kPiece>
inline void add_piece(const char* tables, uint64_t code, __m256i (&sums)[4]) {
  const char* const row = tables + row_offset<kPiece>(code);
  for (int g = 0; g < code_planes_of(kPiece); ++g) {
    const __m256i* const at = reinterpret_cast<const __m256i*>(row + (code_planes_before(kPiece) + g) * kPlaneBytes);
    const bool begun = kPiece > 0 && g < code_planes_of(kPiece > 0 ? kPiece - 1 : 0);
    sums[g] = begun ? _mm256_add_epi16(sums[g], _mm256_load_si256(at)) : _mm256_load_si256(at);
  }
}

template <int... kPieces>
inline __m256i squares(const char* tables, uint64_t code, std::integer_sequence<int, kPieces...>) {
  __m256i sums[4];
  (add_piece<kPieces>(tables, code, sums), ...);
  __m256i total = _mm256_madd_epi16(sums[0], sums[0]);
  for (int g = 1; g < code_planes_of(static_cast<int>(sizeof...(kPieces)) - 1); ++g) {
    total = _mm256_add_epi32(total, _mm256_madd_epi16(sums[g], sums[g]));
  }
  return total;
}

// |R c|^2 of count codes, a multiple of 8.
template <int kPieces>
inline void block_squares(const int16_t* tables, const uint64_t* codes, int64_t count, int32_t* out) {
  const char* const base = reinterpret_cast<const char*>(tables);
  constexpr std::make_integer_sequence<int, kPieces> pieces{};
  for (int64_t i = 0; i < count; i += 8) {
    const auto pair = [&](int j) {
      return _mm256_hadd_epi32(squares(base, codes[i + j], pieces), squares(base, codes[i + j + 1], pieces));
    };
    const __m256i low = _mm256_hadd_epi32(pair(0), pair(2));
    const __m256i high = _mm256_hadd_epi32(pair(4), pair(6));
    const __m256i sums = _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), sums);
  }
}

#else

template <int kPiece>
inline void add_piece(const char* tables, uint64_t code, int16_t* sums) {
  const char* const row = tables + row_offset<kPiece>(code);
  for (int g = 0; g < code_planes_of(kPiece); ++g) {
    const int16_t* const at = reinterpret_cast<const int16_t*>(row + (code_planes_before(kPiece) + g) * kPlaneBytes);
    for (int lane = 0; lane < kCodeLanes; ++lane) sums[kCodeLanes * g + lane] = static_cast<int16_t>(sums[kCodeLanes * g + lane] + at[lane]);
  }
}

template <int... kPieces>
inline int32_t squares(const char* tables, uint64_t code, std::integer_sequence<int, kPieces...>) {
  constexpr int kSums = kCodeLanes * code_planes_of(static_cast<int>(sizeof...(kPieces)) - 1);
  int16_t sums[kSums] = {};
  (add_piece<kPieces>(tables, code, sums), ...);
  int32_t total = 0;
  for (int i = 0; i < kSums; ++i) total += sums[i] * sums[i];
  return total;
}

template <int kPieces>
inline void block_squares(const int16_t* tables, const uint64_t* codes, int64_t count, int32_t* out) {
  constexpr std::make_integer_sequence<int, kPieces> pieces{};
  for (int64_t i = 0; i < count; ++i) out[i] = squares(reinterpret_cast<const char*>(tables), codes[i], pieces);
}

#endif

// Limits, comparisons and what passes in a loop each: hardly ever does anything pass.
template <bool kLargest>
inline int64_t passing_codes(const CodeBlock& block, const uint64_t* codes, int64_t count, const int32_t* squares, int32_t* passing) {
  const uint64_t outside = block.args.members < 64 ? ~uint64_t{0} << block.args.members : 0;
  alignas(64) int32_t limits[kCodeBlock];
  uint64_t any = 0;
#pragma GCC unroll 8
  for (int64_t i = 0; i < count; ++i) {
    any |= codes[i];
    limits[i] = block.limits[__builtin_popcountll(codes[i])];
  }
  const auto passes = [&](int64_t i) { return kLargest ? squares[i] >= limits[i] : squares[i] <= limits[i]; };
  int32_t some = 0;
  for (int64_t i = 0; i < count; ++i) some |= passes(i);
  int64_t found = 0;
  if ((any & outside) != 0) {
    for (int64_t i = 0; i < count; ++i) {
      if (codes[i] >= ~outside) passing[found++] = static_cast<int32_t>(i);  // of all members, or of none
    }
  } else if (some != 0) {
    for (int64_t i = 0; i < count; ++i) {
      if (passes(i)) passing[found++] = static_cast<int32_t>(i);
    }
  }
  return found;
}

template <int kPieces>
int64_t search_block(const CodeBlock& block, const uint64_t* codes, int64_t count, int32_t* passing) {
  alignas(64) int32_t squares[kCodeBlock];
  const int64_t whole = count / 8 * 8;
  block_squares<kPieces>(block.args.tables, codes, whole, squares);
  if (whole < count) {
    uint64_t rest[8] = {};
    for (int64_t i = whole; i < count; ++i) rest[i - whole] = codes[i];
    block_squares<kPieces>(block.args.tables, rest, 8, squares + whole);
  }
  return block.args.largest ? passing_codes<true>(block, codes, count, squares, passing)
                            : passing_codes<false>(block, codes, count, squares, passing);
}

template <int... kBefore>
inline PassingCodes search_of(int members, std::integer_sequence<int, kBefore...>) {
  constexpr PassingCodes searches[] = {search_block<kBefore + 1>...};
  return searches[code_pieces(members) - 1];
}
inline PassingCodes code_search(int members) {
  return search_of(members, std::make_integer_sequence<int, code_pieces(kCodeMembers)>{});
}

// Row i of M from its diagonal on, for every bit i, and then the lanes whose bit is set; off the diagonal entries count twice.
inline double code_value(const CodeTopkArgs& args, uint64_t code) {
  const int n = args.members;
  const int h = __builtin_popcountll(code);
  const uint64_t every = n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0};
  if ((code >> (n - 1) & 1) != 0) code ^= every;
  int64_t sums[kCodeMembers] = {}, diagonal = 0, total = 0;
  for (uint64_t rest = code; rest != 0; rest &= rest - 1) {
    const int i = __builtin_ctzll(rest);
    const int64_t* const row = args.matrix + static_cast<int64_t>(i) * n;
    diagonal += row[i];
    for (int j = i; j < n; ++j) sums[j] += row[j];
  }
  for (int j = 0; j < n; ++j) total += sums[j] & -static_cast<int64_t>(code >> j & 1);
  const int64_t form = 2 * total - diagonal;
  return static_cast<double>(form > 0 ? form : 0) / static_cast<double>((n - h) * (n - h));
}

}  // namespace
}  // namespace pyattr::cpu
