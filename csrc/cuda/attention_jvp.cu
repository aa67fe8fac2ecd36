// Attention and its tangents: see attention_jvp.h for what they are, attention_tile.cuh for the algorithm.
#include "attention_jvp.h"

#include <algorithm>

#include "cuda/attention_limits.cuh"
#include "cuda/attention_tile.cuh"
#include "cuda/reduce.cuh"

namespace pyattr::cuda {

namespace {

struct AttentionPlan {
  int64_t items, rows;  // of a wave
  int64_t probabilities, exact;  // floats
};

AttentionPlan plan_attention(const AttentionJvpArgs& args) {
  const int64_t all = args.batch * args.heads, L = args.queries;
  if (all == 0 || L == 0 || args.value_width == 0) return {};
  AttentionPlan plan{};
  plan.items = std::clamp(kAttentionProbabilities / std::max<int64_t>(L * args.keys, 1), int64_t{1}, all);
  plan.rows = L;
  if (plan.items == 1) {
    const int64_t fit = kAttentionProbabilities / std::max<int64_t>(args.keys, 1) / kAttentionTile * kAttentionTile;
    plan.rows = std::min(L, std::max<int64_t>(fit, kAttentionTile));
  }
  plan.probabilities = plan.items * plan.rows * args.keys;
  plan.exact = plan.items * plan.rows * args.value_width;
  return plan;
}

void launch(void (*kernel)(AttentionTask), AttentionTask task, int64_t blocks, size_t shared, cudaStream_t stream) {
  if (blocks == 0) return;
  void* arguments[] = {&task};
  const dim3 grid(static_cast<unsigned>(std::min(blocks, kAttentionGrid)));
  check(cudaLaunchKernel(kernel, grid, dim3(kAttentionThreads), arguments, shared, stream), "attention_jvp", "launching a kernel");
}

}  // namespace

size_t attention_jvp_workspace(const AttentionJvpArgs& args) {
  const AttentionPlan plan = plan_attention(args);
  return sizeof(float) * static_cast<size_t>(plan.probabilities + plan.exact);
}

void attention_jvp(const AttentionJvpArgs& args, void* workspace, CUstream_st* stream) {
  const AttentionPlan plan = plan_attention(args);
  const auto products = args.value_width <= kAttentionTile       ? attention_products_kernel<1>
                        : args.value_width <= 2 * kAttentionTile ? attention_products_kernel<2>
                                                                 : attention_products_kernel<4>;
  const int64_t together = args.value_width <= kAttentionTile ? 1 : args.value_width <= 2 * kAttentionTile ? 2 : 4;
  const auto tiles = [](int64_t size) { return (size + kAttentionTile - 1) / kAttentionTile; };
  const int64_t value_tiles = (tiles(args.value_width) + together - 1) / together;
  for (int64_t item = 0; plan.items > 0 && item < args.batch * args.heads; item += plan.items) {
    for (int64_t row = 0; row < args.queries; row += plan.rows) {
      AttentionTask task{args, item, std::min(plan.items, args.batch * args.heads - item), row,
                         std::min(plan.rows, args.queries - row), static_cast<float*>(workspace),
                         static_cast<float*>(workspace) + plan.probabilities, true};
      const int64_t row_tiles = task.items * tiles(task.rows);
      launch(attention_scores_kernel, task, row_tiles * tiles(args.keys), kAttentionShared, stream);
      if (args.keys > 0) launch(attention_softmax_kernel, task, (task.items * task.rows + 3) / 4, 0, stream);
      launch(products, task, row_tiles * value_tiles, kAttentionShared, stream);
      task.primal = false;
      launch(products, task, args.tangents * row_tiles * value_tiles, kAttentionShared, stream);
    }
  }
}

}  // namespace pyattr::cuda
