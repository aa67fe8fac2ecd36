// The CUDA attention kernels' own source, compiled for a CPU, behind C functions.
#include "cuda/attention_jvp.cu"

extern "C" {
size_t attention_jvp_workspace(const pyattr::AttentionJvpArgs* args) { return pyattr::cuda::attention_jvp_workspace(*args); }
// readable: [count, 2], begin and end of what the kernels may read.
const char* attention_jvp(const pyattr::AttentionJvpArgs* args, void* workspace, const uintptr_t* readable, int count, int reverse) {
  emulator::state.error.clear();
  emulator::state.reverse = reverse != 0;
  emulator::state.readable.clear();
  for (int i = 0; i < count; ++i) emulator::state.readable.emplace_back(readable[2 * i], readable[2 * i + 1]);
  pyattr::cuda::attention_jvp(*args, workspace, nullptr);
  return emulator::state.error.c_str();
}
}
