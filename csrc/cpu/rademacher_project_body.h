// The sign projection's tile, included by one file per SIMD level and compiled with that level's flags. Everything has internal
// linkage, so that no other file links this code.
//
// Method of Four Russians with the samples in the lanes: for four columns the 16 signed sums of their entries are tabulated, one
// vector of samples each; a row of the matrix then costs one load and one add per four columns and vector, whatever its signs.
// Floor: two loads a cycle (Zen 3), so 64 sign-adds a cycle and core with 8 lanes, 1/16 of which the table itself costs at 1,024
// rows; index arithmetic (rotate, mask) fills the issue slots between.
//
// Order of summation, the same for every level, lane count and batch: four columns are (+-x0 +- x1) + (+-x2 +- x3), 32 columns their
// eight fours in turn, 64 columns the sum of two of these, a chunk its 64s in turn.
#include <algorithm>

#include "common/philox.h"
#include "cpu/buffer.h"
#include "cpu/philox_rows.h"
#include "cpu/projection.h"
#include "cpu/registers.h"
#include "cpu/stage.h"

namespace pyattr::cpu {
namespace {

constexpr int64_t kBlock = kSignsPerCall;  // columns of one Philox call
constexpr int64_t kHalf = kBlock / 2;      // columns whose tables are in use at a time: 16 KB with 16 lanes
constexpr int64_t kPadRows = 16;           // what a vector of rows may read and write past the last row
constexpr int64_t kSlabSamples = 64;       // samples that share the signs of a block
#if defined(__AVX2__)
constexpr int kLanes = 16;  // with AVX2, two registers an entry share the index arithmetic
#else
constexpr int kLanes = 8;
#endif

inline uint64_t rotate_right(uint64_t x, int n) { return n == 0 ? x : x >> n | x << (64 - n); }

// table[n][e][W]: the signed sum of columns 4n .. 4n+3 of x [64][W] whose signs are the bits of e.
template <int W>
void tabulate(const float* x, float* table) {
  using reg = register_t<W>;
  constexpr int V = kRegisters<W>;
  const reg* in = reinterpret_cast<const reg*>(x);
  reg* out = reinterpret_cast<reg*>(table);
  for (int64_t n = 0; n < kHalf / 4; ++n, in += 4 * V, out += 16 * V) {
    for (int v = 0; v < V; ++v) {
      const reg low_sum = in[v] + in[V + v], low_difference = in[v] - in[V + v];
      const reg high_sum = in[2 * V + v] + in[3 * V + v], high_difference = in[2 * V + v] - in[3 * V + v];
      const reg low[4] = {-low_sum, low_difference, -low_difference, low_sum};
      const reg high[4] = {-high_sum, high_difference, -high_difference, high_sum};
      for (int e = 0; e < 16; ++e) out[e * V + v] = low[e & 3] + high[e >> 2];
    }
  }
}

// sums[j][W] += the 64 columns' signed sums, for each row's 64 signs. The 32s are summed in turns, so that four chains of adds
// (with 16 lanes and AVX2) hide each other's latency, and the compiler is kept from undoing that and from computing an address for
// each entry, which the load can add up by itself: 6.2 ns a row on a Zen 3 core where its own choice took 8 (-O3) to 16 (-O2). The
// floor, 32 loads at two a cycle, is about 5.
template <int W>
void add_rows(const float* table, const uint64_t* signs, int64_t rows, float* sums) {
  using reg = register_t<W>;
  constexpr int V = kRegisters<W>;
  constexpr int kShift = W == 1 ? 2 : W == 4 ? 4 : W == 8 ? 5 : 6;  // log2 of an entry's bytes
  static_assert(4 * W == 1 << kShift);
  const char* base = reinterpret_cast<const char*>(table);
  for (int64_t j = 0; j < rows; ++j) {
    const uint64_t word = signs[j];
    reg part[2][V];  // of 32 columns each
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q) {
        const int n = 8 * q + i;
        // Rotated so that the nibble's value is already a byte offset.
        uint64_t offset = rotate_right(word, (4 * n - kShift + 64) % 64) & (uint64_t{15} << kShift);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          in_this_order(offset);
          const reg entry = *reinterpret_cast<const reg*>(base + (n * 16 * V + v) * sizeof(reg) + offset);
          part[q][v] = i == 0 ? entry : part[q][v] + entry;
          in_this_order(part[q][v]);
        }
      }
    }
    reg* sum = reinterpret_cast<reg*>(sums + j * W);
    for (int v = 0; v < V; ++v) sum[v] += part[0][v] + part[1][v];
  }
}

// The same for one sample, whose tables fit in registers: a row of lanes looks its entries up with one permutation. Reads signs and
// writes sums for rows rounded up to a multiple of kPadRows.
#if defined(__AVX512F__)
inline void add_rows_of_one(const float* table, const uint64_t* signs, int64_t rows, float* sums) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int64_t j = 0; j < rows; j += 16) {
    const __m512i first = _mm512_loadu_si512(signs + j), second = _mm512_loadu_si512(signs + j + 8);
    __m512 part[2];
    for (int q = 0; q < 2; ++q) {
      const __m512i words = _mm512_permutex2var_epi32(first, q == 0 ? even : odd, second);
      for (int n = 0; n < 8; ++n) {  // the permutation reads the low 4 bits of each lane
        const __m512 entries = _mm512_load_ps(table + (8 * q + n) * 16);
        const __m512 nibble = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * n), entries);
        part[q] = n == 0 ? nibble : _mm512_add_ps(part[q], nibble);
      }
    }
    _mm512_storeu_ps(sums + j, _mm512_add_ps(_mm512_loadu_ps(sums + j), _mm512_add_ps(part[0], part[1])));
  }
}
#elif defined(__AVX2__)
inline void add_rows_of_one(const float* table, const uint64_t* signs, int64_t rows, float* sums) {
  // A permutation has 8 entries, a nibble 16, but entry e is minus entry 15 - e: a nibble with its top bit clear has its other
  // bits flipped, looks up among the upper eight, and flips the result's sign.
  const __m256i top = _mm256_set1_epi32(0x11111111), sign = _mm256_set1_epi32(static_cast<int>(0x80000000u));
  for (int64_t j = 0; j < rows; j += 8) {
    const __m256 first = _mm256_loadu_ps(reinterpret_cast<const float*>(signs + j));
    const __m256 second = _mm256_loadu_ps(reinterpret_cast<const float*>(signs + j + 4));
    __m256 part[2];
    for (int q = 0; q < 2; ++q) {
      const __m256 mixed = q == 0 ? _mm256_shuffle_ps(first, second, 0x88) : _mm256_shuffle_ps(first, second, 0xDD);
      const __m256i words = _mm256_permute4x64_epi64(_mm256_castps_si256(mixed), 0xD8);  // rows back in order
      const __m256i clear = _mm256_andnot_si256(_mm256_srli_epi32(words, 3), top);
      const __m256i flips = _mm256_sub_epi32(_mm256_slli_epi32(clear, 3), clear);  // 7 where the top bit is clear
      const __m256i flipped = _mm256_xor_si256(words, flips);
      for (int n = 0; n < 8; ++n) {
        const __m256 entries = _mm256_load_ps(table + (8 * q + n) * 16 + 8);
        const __m256 value = _mm256_permutevar8x32_ps(entries, _mm256_srli_epi32(flipped, 4 * n));
        const __m256i minus = _mm256_andnot_si256(_mm256_slli_epi32(words, 28 - 4 * n), sign);
        const __m256 nibble = _mm256_xor_ps(value, _mm256_castsi256_ps(minus));
        part[q] = n == 0 ? nibble : _mm256_add_ps(part[q], nibble);
      }
    }
    _mm256_storeu_ps(sums + j, _mm256_add_ps(_mm256_loadu_ps(sums + j), _mm256_add_ps(part[0], part[1])));
  }
}
#else
inline void add_rows_of_one(const float* table, const uint64_t* signs, int64_t rows, float* sums) {
  add_rows<1>(table, signs, rows, sums);
}
#endif

template <int W>
void project_slab(const ProjectTile& tile, int64_t sample_begin, int64_t sample_end) {
  const ProjectArgs& args = *tile.args;
  const int64_t rows = tile.row_end - tile.row_begin;
  const int64_t groups = (sample_end - sample_begin + W - 1) / W;
  const int64_t padded = (rows + kPadRows - 1) / kPadRows * kPadRows;
  auto signs = aligned_array<uint64_t>(2 * padded);          // [2][padded]
  auto staged = aligned_array<float>(groups * kBlock * W);   // [groups][128][W]
  auto table = aligned_array<float>(kHalf / 4 * 16 * W);     // [16][16][W]
  auto sums = aligned_array<float>(groups * padded * W);     // [groups][rows][W]
  std::fill_n(signs.get(), 2 * padded, 0);
  std::fill_n(sums.get(), groups * padded * W, 0.0f);
  const int64_t first = args.column_offset + tile.column_begin, last = args.column_offset + tile.column_end;
  for (int64_t block = first / kBlock; block * kBlock < last; ++block) {
    uint64_t* const halves[2] = {signs.get(), signs.get() + padded};
    philox_rows(static_cast<uint32_t>(block), tile.row_begin, rows, args.seed, args.stream, halves[0], halves[1]);
    const int64_t begin = std::max(first, block * kBlock), end = std::min(last, (block + 1) * kBlock);
    // Columns outside the tile and lanes without a sample hold zeros, which add nothing.
    std::fill_n(staged.get(), groups * kBlock * W, 0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t sample = sample_begin + g * W;
      float* x = staged.get() + g * kBlock * W;  // [128][W]
      stage<W>(args, sample, std::min<int64_t>(W, sample_end - sample), begin - args.column_offset,
               end - args.column_offset, x + (begin - block * kBlock) * W);
      for (int half = 0; half < 2; ++half) {
        tabulate<W>(x + half * kHalf * W, table.get());
        if constexpr (W == 1) {
          add_rows_of_one(table.get(), halves[half], rows, sums.get());
        } else {
          add_rows<W>(table.get(), halves[half], rows, sums.get() + g * rows * W);
        }
      }
    }
  }
  for (int64_t b = sample_begin; b < sample_end; ++b) {
    const int64_t g = (b - sample_begin) / W, lane = (b - sample_begin) % W;
    const float* sum = sums.get() + g * rows * W + lane;
    float* out = tile.sums + b * tile.sums_stride;
    for (int64_t j = 0; j < rows; ++j) out[j] = tile.add ? out[j] + sum[j * W] : sum[j * W];
  }
}

void project_tile(const ProjectTile& tile) {
  const int64_t B = tile.args->num_samples;
  for (int64_t begin = 0; begin < B; begin += kSlabSamples) {
    const int64_t end = std::min(B, begin + kSlabSamples);
    if (end - begin == 1) {
      project_slab<1>(tile, begin, end);
    } else if (end - begin <= 4) {
      project_slab<4>(tile, begin, end);
    } else if (end - begin <= 8) {
      project_slab<8>(tile, begin, end);
    } else {
      project_slab<kLanes>(tile, begin, end);
    }
  }
}

}  // namespace
}  // namespace pyattr::cpu
