#include "group_norm_silu_jvp.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/simd_level.h"
#include "cpu/group_norm_silu_jvp_body.h"
#include "cpu/huge_pages.h"

namespace pyattr::cpu {

#if defined(PYATTR_X86)
void group_norm_task_avx2(const GroupNormTask& task);
void group_norm_task_avx512(const GroupNormTask& task);
#endif

namespace {

constexpr int64_t kLineChannels = 16;  // float32 channels of a cache line, channels-last: a task takes at least these
constexpr int64_t kTasksPerThread = 2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tangents that no cache holds until they are read again are written past it.
constexpr int64_t kCachedBytes = 32 << 20;

int64_t bytes(const GroupNormSiluJvpArgs& args) {  // of all tangents
  return args.num_tangents * args.num_samples * args.num_channels * args.num_positions * (args.dtype == Dtype::float32 ? 4 : 2);
}

bool channels_last(const TangentArray& array) { return array.channel_stride == 1 && array.position_stride != 1; }

}  // namespace

void group_norm_silu_jvp(const GroupNormSiluJvpArgs& args, int num_threads) {
  GroupNormKernel kernel = group_norm_task;
#if defined(PYATTR_X86)
  if (simd_level() == SimdLevel::avx2) kernel = group_norm_task_avx2;
  if (simd_level() == SimdLevel::avx512) kernel = group_norm_task_avx512;
#endif
  if (args.group_size() == 0) return;
  for (const TangentArray& out : {args.y_dot, args.sum_dot}) {
    if (out.data != nullptr) expect_huge_pages(out.data, bytes(args));
  }
  const int threads = usable_threads(num_threads);
  const int64_t K = args.num_tangents, G = args.num_groups;
  const int64_t groups = channels_last(args.x_dot) ? ceil_div(kLineChannels, args.group_channels()) : 1;  // of a task
  const int64_t per_sample = ceil_div(G, groups), blocks = args.num_samples * per_sample;
  // With too few groups for the threads, tangents are cut as well; each part then computes the primal for itself.
  if (blocks == 0) return;
  const int64_t parts = std::clamp<int64_t>(ceil_div(kTasksPerThread * threads, blocks), 1, std::max<int64_t>(K, 1));
  const int64_t tangents = ceil_div(K, parts);
  parallel_for(blocks * parts, threads, [&](int64_t index) {
    const int64_t block = index / parts, part = index % parts;
    const int64_t group = block % per_sample * groups;
    kernel({&args, block / per_sample, group, std::min(G, group + groups), std::min(K, part * tangents),
            std::min(K, (part + 1) * tangents), part == 0, bytes(args) > kCachedBytes});
  });
}

}  // namespace pyattr::cpu
