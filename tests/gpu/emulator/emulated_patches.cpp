// The CUDA patch kernels' own source, compiled for a CPU, behind C functions.
#include "cuda/patch_mean.cu"
#include "cuda/patch_topk.cu"

namespace {
template <class Args>
const char* run(const Args& args, void* workspace, size_t bank_bytes, int reverse, void (*kernel)(const Args&, void*, CUstream_st*)) {
  emulator::state.error.clear();
  emulator::state.reverse = reverse != 0;
  const auto address = [](const void* at) { return reinterpret_cast<uintptr_t>(at); };
  const size_t query_bytes = static_cast<size_t>(args.channels * args.query_height * args.query_width) * sizeof(float);
  emulator::state.readable = {{address(args.query), address(args.query) + query_bytes},
                              {address(args.bank), address(args.bank) + bank_bytes}};
  kernel(args, workspace, nullptr);
  return emulator::state.error.c_str();
}
}  // namespace

extern "C" {
size_t patch_topk_workspace(const pyattr::PatchTopkArgs* args) { return pyattr::cuda::patch_topk_workspace(*args); }
size_t patch_mean_workspace(const pyattr::PatchMeanArgs* args) { return pyattr::cuda::patch_mean_workspace(*args); }
const char* patch_topk(const pyattr::PatchTopkArgs* args, void* workspace, size_t bank_bytes, int reverse) {
  return run(*args, workspace, bank_bytes, reverse, pyattr::cuda::patch_topk);
}
const char* patch_mean(const pyattr::PatchMeanArgs* args, void* workspace, size_t bank_bytes, int reverse) {
  return run(*args, workspace, bank_bytes, reverse, pyattr::cuda::patch_mean);
}
}
