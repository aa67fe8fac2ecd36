// The CUDA kernels' own source, compiled for a CPU, behind a C function.
#include "cuda/group_norm_silu_jvp.cu"

namespace {
struct Request {
  pyattr::GroupNormSiluJvpArgs args;
  uintptr_t readable[4][2];  // begin and end of what x, x_dot, residual and residual_dot may be read from
  int reverse;
};
}  // namespace

extern "C" const char* group_norm_silu_jvp(const Request* request) {
  emulator::state.error.clear();
  emulator::state.reverse = request->reverse != 0;
  emulator::state.readable.clear();
  for (const auto& range : request->readable) emulator::state.readable.emplace_back(range[0], range[1]);
  pyattr::cuda::group_norm_silu_jvp(request->args, nullptr);
  return emulator::state.error.c_str();
}
