// Means of pixels on CUDA cores: see patch_mean.h for what they are, patch_tile.cuh for the algorithm.
#include "patch_mean.h"

#include "cuda/patch_launch.cuh"

namespace pyattr::cuda {

size_t patch_mean_workspace(const PatchMeanArgs& args) { return patch_workspace(args); }

void patch_mean(const PatchMeanArgs& args, void* workspace, CUstream_st* stream) {
  PatchTask task{};
  task.minima = args.minima;
  task.sums = args.sums;
  task.pixels = args.pixels;
  run_patches<MeanRow>("patch_mean", args, task, workspace, stream);
}

}  // namespace pyattr::cuda
