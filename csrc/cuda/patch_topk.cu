// Patch statistics on CUDA cores: see patch_topk.h for what they are, patch_tile.cuh for the algorithm.
#include "patch_topk.h"

#include "cuda/patch_launch.cuh"

namespace pyattr::cuda {

size_t patch_topk_workspace(const PatchTopkArgs& args) { return patch_workspace(args); }

void patch_topk(const PatchTopkArgs& args, void* workspace, CUstream_st* stream) {
  PatchTask task{};
  task.minima = args.minima;
  task.sums = args.sums;
  task.k = args.k;
  task.tops = args.tops;
  task.nearest = args.nearest;
  run_patches<TopRow>("patch_topk", args, task, workspace, stream);
}

}  // namespace pyattr::cuda
