#include "hadamard_project.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/simd_level.h"
#include "cpu/hadamard_project_body.h"

namespace pyattr::cpu {

#if defined(PYATTR_X86)
void hadamard_tile_avx2(const HadamardTile& tile);
void hadamard_tile_avx512(const HadamardTile& tile);
#endif

namespace {

// Blocks whose sum joins the total at once, and the width of a block: functions of D and P alone, since they order the sums.
// Four columns for each output leave a quarter of a gather to each; 2^16 of them (256 KB) stay in a second-level cache.
constexpr int64_t kChunkBlocks = 8;
constexpr int kFewestBits = 10, kMostBits = 16;
constexpr int64_t kGroupSamples = 8;  // share a block's signs

int block_bits(const ProjectArgs& args) {
  const int wanted = std::clamp(hadamard_bits(args.proj_dim) + 2, kFewestBits, kMostBits);
  return std::min(wanted, std::max(hadamard_bits(args.num_columns), 7));
}

}  // namespace

void hadamard_project(const ProjectArgs& args, int num_threads) {
  const int64_t B = args.num_samples, D = args.proj_dim;
  if (B == 0 || D == 0) return;
  HadamardKernel kernel = hadamard_tile;
#if defined(PYATTR_X86)
  if (simd_level() == SimdLevel::avx2) kernel = hadamard_tile_avx2;
  if (simd_level() == SimdLevel::avx512) kernel = hadamard_tile_avx512;
#endif
  const int threads = usable_threads(num_threads), bits = block_bits(args), total_bits = hadamard_bits(args.num_columns);
  const int64_t width = int64_t{1} << bits, blocks = (args.num_columns + width - 1) / width;
  const int64_t chunks = (blocks + kChunkBlocks - 1) / kChunkBlocks;
  const int64_t padded = (D + kHadamardPadRows - 1) / kHadamardPadRows * kHadamardPadRows;
  auto low = aligned_array<uint32_t>(padded), high = aligned_array<uint32_t>(padded);
  std::fill(low.get() + D, low.get() + padded, 0);
  std::fill(high.get() + D, high.get() + padded, 0);
  parallel_for((D + 255) / 256, threads, [&](int64_t part) {
    for (int64_t j = part * 256; j < std::min(D, part * 256 + 256); ++j) {
      const int64_t row = permute_bits(j, total_bits, args.seed, args.stream);
      low[j] = static_cast<uint32_t>(row & (width - 1)), high[j] = static_cast<uint32_t>(row >> bits);
    }
  });
  // Some samples and some chunks at a time: every thread has sums for a group of samples.
  const int64_t slab = std::min(B, kGroupSamples * threads);
  const int64_t most_groups = (slab + kGroupSamples - 1) / kGroupSamples;
  const int64_t wave = std::clamp<int64_t>((threads + most_groups - 1) / most_groups, 1, std::max<int64_t>(chunks, 1));
  auto sums = aligned_array<float>(wave * slab * padded);  // [wave][slab][padded]
  for (int64_t begin = 0; begin < B; begin += slab) {
    const int64_t samples = std::min(slab, B - begin), groups = (samples + kGroupSamples - 1) / kGroupSamples;
    for (int64_t first = 0; first < chunks; first += wave) {
      const int64_t count = std::min(wave, chunks - first);
      parallel_for(count * groups, threads, [&](int64_t task) {
        const int64_t chunk = task / groups, sample = task % groups * kGroupSamples;
        const int64_t block = (first + chunk) * kChunkBlocks;
        kernel({&args, begin + sample, std::min(kGroupSamples, samples - sample), block, std::min(blocks, block + kChunkBlocks),
                bits, low.get(), high.get(), padded, sums.get() + (chunk * slab + sample) * padded});
      });
      parallel_for(samples, threads, [&](int64_t s) {
        float* const out = args.out + (begin + s) * D;
        for (int64_t chunk = 0; chunk < count; ++chunk) {
          const float* const from = sums.get() + (chunk * slab + s) * padded;
          for (int64_t j = 0; j < D; ++j) out[j] = first + chunk == 0 ? from[j] : out[j] + from[j];
        }
      });
    }
    for (int64_t e = begin * D; e < (begin + samples) * D; ++e) args.out[e] = chunks == 0 ? 0.0f : args.out[e] * args.scale;
  }
}

}  // namespace pyattr::cpu
