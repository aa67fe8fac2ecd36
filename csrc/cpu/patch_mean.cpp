#include "patch_mean.h"

#include <cmath>

#include "common/parallel.h"
#include "cpu/patch_mean_body.h"

namespace pyattr::cpu {

#if defined(PYATTR_X86)
void mean_blocks_avx2(const PatchWork& work);
void mean_blocks_avx512(const PatchWork& work);
#endif

namespace {

constexpr int64_t kJoinPositions = 8;  // of a task

void join(const PatchMeanJoinArgs& args, int64_t u) {
  const int64_t U = args.positions, N = args.num_images;
  double least = args.least[u], total = args.total[u];
  for (int64_t n = 0; n < N; ++n) {
    const double m = args.minima[u * N + n];
    double factor = 1.0;
    if (m < least) {  // what there is becomes relative to the new least; at first it is 0, and the old least infinite
      const double shrunk = total == 0.0 ? 0.0 : std::exp((m - least) * args.inverse);
      total *= shrunk;
      for (int64_t c = 0; c < args.channels; ++c) args.mean[c * U + u] *= shrunk;
      least = m;
    } else {
      factor = std::exp((least - m) * args.inverse);
    }
    total += factor * args.sums[u * N + n];
    for (int64_t c = 0; c < args.channels; ++c) args.mean[c * U + u] += factor * args.pixels[(c * U + u) * N + n];
  }
  args.least[u] = least, args.total[u] = total;
}

}  // namespace

void patch_mean(const PatchMeanArgs& args, int num_threads) {
  auto kernel = mean_blocks;
#if defined(PYATTR_X86)
  if (simd_level() == SimdLevel::avx2) kernel = mean_blocks_avx2;
  if (simd_level() == SimdLevel::avx512) kernel = mean_blocks_avx512;
#endif
  for_patch_blocks(args, num_threads, kernel);
}

void patch_mean_join(const PatchMeanJoinArgs& args, int num_threads) {
  const int64_t U = args.positions;
  parallel_for((U + kJoinPositions - 1) / kJoinPositions, num_threads, [&](int64_t task) {
    const int64_t end = std::min(U, (task + 1) * kJoinPositions);
    for (int64_t u = task * kJoinPositions; u < end; ++u) join(args, u);
  });
}

}  // namespace pyattr::cpu
