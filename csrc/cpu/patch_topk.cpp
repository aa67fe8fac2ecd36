#include "patch_topk.h"

#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "cpu/patch_topk_body.h"

namespace pyattr::cpu {

#if defined(PYATTR_X86)
void topk_blocks_avx2(const PatchWork& work);
void topk_blocks_avx512(const PatchWork& work);
#endif

namespace {

constexpr int64_t kJoinPositions = 8, kJoinImages = 512;  // of a task

// The positions' normalisers, and tops as shares of them.
void normalise(const PatchJoinArgs& args, int64_t u) {
  const int64_t N = args.num_images;
  const float* const minima = args.minima + u * N;
  const float* const sums = args.sums + u * N;
  float* const tops = args.tops + u * N;
  float least = std::numeric_limits<float>::max();
  for (int64_t n = 0; n < N; ++n) least = std::min(least, minima[n]);
  // exp(x) is 0 in float64 from there on, and most are.
  const auto factor = [&](int64_t n) {
    const double x = (static_cast<double>(least) - minima[n]) * args.inverse;
    return x < -746.0 ? 0.0 : std::exp(x);
  };
  double total = 0.0;
  for (int64_t n = 0; n < N; ++n) total += sums[n] * factor(n);
  for (int64_t n = 0; n < N; ++n) tops[n] = static_cast<float>(tops[n] * factor(n) / total);
  args.log_normaliser[u] = std::log(total) - least * args.inverse;
  // Of nothing in sight 0 / 0.
  if (args.nearest_weights) args.nearest_weights[u] = (least < std::numeric_limits<float>::max() ? 1.0 : 0.0) / total;
}

}  // namespace

void patch_topk(const PatchTopkArgs& args, int num_threads) {
  auto kernel = topk_blocks;
#if defined(PYATTR_X86)
  if (simd_level() == SimdLevel::avx2) kernel = topk_blocks_avx2;
  if (simd_level() == SimdLevel::avx512) kernel = topk_blocks_avx512;
#endif
  for_patch_blocks(args, num_threads, kernel);
}

void patch_join(const PatchJoinArgs& args, int num_threads) {
  const int64_t U = args.positions, N = args.num_images;
  parallel_for((U + kJoinPositions - 1) / kJoinPositions, num_threads, [&](int64_t task) {
    const int64_t end = std::min(U, (task + 1) * kJoinPositions);
    for (int64_t u = task * kJoinPositions; u < end; ++u) normalise(args, u);
  });
  parallel_for((N + kJoinImages - 1) / kJoinImages, num_threads, [&](int64_t task) {
    const int64_t end = std::min(N, (task + 1) * kJoinImages);
    for (int64_t u = 0; u < U; ++u)
      for (int64_t n = task * kJoinImages; n < end; ++n) args.weights[n] += args.tops[u * N + n];
  });
}

}  // namespace pyattr::cpu
