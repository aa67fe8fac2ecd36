// The CUDA kernel of code_topk, its own source, compiled for a CPU, behind a C function.
#include "cuda/code_topk.cu"

extern "C" const char* code_topk(const pyattr::CodeFlagsArgs* args, int reverse) {
  emulator::state.error.clear();
  emulator::state.reverse = reverse != 0;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(args->codes);
  emulator::state.readable = {{begin, begin + static_cast<size_t>(args->num_codes) * sizeof(uint64_t)}};
  pyattr::cuda::code_topk(*args, nullptr);
  return emulator::state.error.c_str();
}
