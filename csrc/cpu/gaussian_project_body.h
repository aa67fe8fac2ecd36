// The normal projection's tile, included by one file per SIMD level and compiled with that level's flags. Everything has internal
// linkage, so that no other file links this code.
//
// Rows of the matrix are the lanes: a block of 128 columns by 16 rows is generated once (8 KB, first-level cache) and multiplied
// with every sample. Generation costs about 40 operations an entry against 2 a sample, so it is the floor up to some 20 samples.
//
// Order of summation, the same for every level and batch: a block's 128 products in turn from zero, a chunk its blocks in turn.
// No product is fused with its sum (the build says -ffp-contract=off), so the levels agree bit for bit.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/philox.h"
#include "cpu/buffer.h"
#include "cpu/philox_rows.h"
#include "cpu/projection.h"
#include "cpu/registers.h"
#include "cpu/stage.h"

namespace pyattr::cpu {
namespace {

constexpr int kRows = 16;
constexpr int64_t kBlock = 128;
constexpr int64_t kSlabSamples = 64;

inline float from_bits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int32_t to_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// sqrt(-2 ln((a + 0.5) 2^-32)), to a few 2^-24 relative for every a. The upper half of the range goes through 1 - u, which an
// integer complement gives exactly, so that radii near 0 keep their digits.
inline float radius(uint32_t a) {
  const bool upper = a >> 31;
  const int32_t magnitude = static_cast<int32_t>(upper ? ~a : a);  // below 2^31
  const float v = (static_cast<float>(magnitude) + 0.5f) * 0x1p-32f;
  const float u = upper ? 1.0f - v : v;
  const float rounding = upper ? ((1.0f - u) - v) / u : 0.0f;  // ln(1 - v) = ln(u) + this, where u = 1 - v was rounded
  // u = 2^e m with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh(s), s = (m - 1) / (m + 1), |s| < 0.172, as its series to s^9.
  const int32_t e = (to_bits(u) - 0x3F3504F3) >> 23;
  const float m = from_bits(to_bits(u) - e * (1 << 23));
  const float s = (m - 1.0f) / (m + 1.0f), t = s * s;
  const float series = 2.0f + t * (2.0f / 3 + t * (2.0f / 5 + t * (2.0f / 7 + t * (2.0f / 9))));
  const float logarithm = static_cast<float>(e) * 0.693147180559945f + (s * series + rounding);
  return std::sqrt(std::max(0.0f, -2.0f * logarithm));
}

// r cos(2 pi b 2^-32) and r sin(2 pi b 2^-32). The quadrant is split off in integers, so the angle keeps its digits too.
inline void polar(float r, uint32_t b, float* even, float* odd) {
  const uint32_t quadrant = (b + 0x20000000u) >> 30;
  const float x = static_cast<float>(static_cast<int32_t>(b - (quadrant << 30))) * 1.46291807926715968e-9f;  // 2 pi 2^-32
  const float t = x * x;
  const float sine = x + x * t * (-1.0f / 6 + t * (1.0f / 120 + t * (-1.0f / 5040 + t * (1.0f / 362880))));
  const float cosine =
      1.0f + t * (-0.5f + t * (1.0f / 24 + t * (-1.0f / 720 + t * (1.0f / 40320 + t * (-1.0f / 3628800)))));
  const bool swap = quadrant & 1;
  const float c = swap ? sine : cosine, s = swap ? cosine : sine;
  // cos is negative in quadrants 1 and 2, sin in 2 and 3.
  *even = r * ((quadrant + 1) & 2 ? -c : c);
  *odd = r * (quadrant & 2 ? -s : s);
}

// normals[c][l]: row first_row + l, column 128 block + c.
void generate(int64_t block, int64_t first_row, uint32_t seed, uint32_t stream, float (*normals)[kRows]) {
  uint64_t low[kRows], high[kRows];
  for (int64_t call = 0; call < kBlock / kNormalsPerCall; ++call, normals += kNormalsPerCall) {
    philox_rows(static_cast<uint32_t>(block * (kBlock / kNormalsPerCall) + call), first_row, kRows, seed, stream, low, high);
    for (int pair = 0; pair < 2; ++pair) {
      const uint64_t* words = pair == 0 ? low : high;
      for (int l = 0; l < kRows; ++l) {
        const float r = radius(static_cast<uint32_t>(words[l]));
        polar(r, static_cast<uint32_t>(words[l] >> 32), &normals[2 * pair][l], &normals[2 * pair + 1][l]);
      }
    }
  }
}

// sums[k][l] += sum_c normals[c][l] * x[k][c], for kSamples rows of x.
template <int kSamples>
void multiply(const float (*normals)[kRows], const float* x, float* sums) {
  using reg = register_t<kRows>;
  constexpr int V = kRegisters<kRows>;
  reg sum[kSamples][V] = {};
  for (int64_t c = 0; c < kBlock; ++c) {
    const reg* z = reinterpret_cast<const reg*>(normals[c]);
    for (int k = 0; k < kSamples; ++k)
      for (int v = 0; v < V; ++v) sum[k][v] += z[v] * x[k * kBlock + c];
  }
  for (int k = 0; k < kSamples; ++k)
    for (int v = 0; v < V; ++v) reinterpret_cast<reg*>(sums + k * kRows)[v] += sum[k][v];
}

void project_slab(const ProjectTile& tile, int64_t sample_begin, int64_t sample_end) {
  const ProjectArgs& args = *tile.args;
  const int64_t samples = sample_end - sample_begin;
  const int64_t first = args.column_offset + tile.column_begin, last = args.column_offset + tile.column_end;
  const int64_t blocks = first == last ? 0 : (last - 1) / kBlock - first / kBlock + 1;
  const int64_t first_column = first / kBlock * kBlock;
  // All of the slab's chunk, zero outside the tile; 8 MB at most.
  auto staged = aligned_array<float>(blocks * samples * kBlock);  // [blocks][samples][128]
  std::fill_n(staged.get(), blocks * samples * kBlock, 0.0f);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t start = first_column + i * kBlock;
    const int64_t begin = std::max(first, start), end = std::min(last, start + kBlock);
    for (int64_t b = 0; b < samples; ++b)
      stage<1>(args, sample_begin + b, 1, begin - args.column_offset, end - args.column_offset,
               staged.get() + (i * samples + b) * kBlock + (begin - start));
  }
  alignas(64) float normals[kBlock][kRows];
  auto sums = aligned_array<float>(samples * kRows);  // [samples][16]
  for (int64_t row = tile.row_begin; row < tile.row_end; row += kRows) {
    std::fill_n(sums.get(), samples * kRows, 0.0f);
    for (int64_t i = 0; i < blocks; ++i) {
      generate(first_column / kBlock + i, row, args.seed, args.stream, normals);
      const float* x = staged.get() + i * samples * kBlock;
      int64_t b = 0;
      for (; b + 4 <= samples; b += 4) multiply<4>(normals, x + b * kBlock, sums.get() + b * kRows);
      for (; b < samples; ++b) multiply<1>(normals, x + b * kBlock, sums.get() + b * kRows);
    }
    const int64_t count = std::min<int64_t>(kRows, tile.row_end - row);
    for (int64_t b = 0; b < samples; ++b) {
      float* out = tile.sums + (sample_begin + b) * tile.sums_stride + (row - tile.row_begin);
      for (int64_t l = 0; l < count; ++l) out[l] = tile.add ? out[l] + sums[b * kRows + l] : sums[b * kRows + l];
    }
  }
}

void project_tile(const ProjectTile& tile) {
  const int64_t B = tile.args->num_samples;
  for (int64_t begin = 0; begin < B; begin += kSlabSamples) project_slab(tile, begin, std::min(B, begin + kSlabSamples));
}

}  // namespace
}  // namespace pyattr::cpu
