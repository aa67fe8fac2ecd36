// The CUDA kernels' own source, compiled for a CPU, behind two C functions.
#include "cuda/gaussian_project.cu"
#include "cuda/hadamard_project.cu"
#include "cuda/rademacher_project.cu"
#include "cuda/sparse_project.cu"

namespace {
struct Request {
  pyattr::SketchArgs args;  // nonzeros is read by the sparse projection alone
  void* workspace;
  size_t readable_bytes_before, readable_bytes_after;  // around args.grads
  int shared_limit, reverse;
};

template <class Run>
const char* run(const Request& request, Run project) {
  emulator::state.error.clear();
  emulator::state.shared_limit = request.shared_limit;
  emulator::state.reverse = request.reverse != 0;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(request.args.grads);
  emulator::state.readable = {{begin - request.readable_bytes_before, begin + request.readable_bytes_after}};
  project(request.args, request.workspace, nullptr);
  return emulator::state.error.c_str();
}
}  // namespace

extern "C" {
size_t rademacher_project_workspace(const Request* request) { return pyattr::cuda::rademacher_project_workspace(request->args); }
size_t gaussian_project_workspace(const Request* request) { return pyattr::cuda::gaussian_project_workspace(request->args); }
size_t hadamard_project_workspace(const Request* request) { return pyattr::cuda::hadamard_project_workspace(request->args); }
const char* rademacher_project(const Request* request) { return run(*request, pyattr::cuda::rademacher_project); }
const char* gaussian_project(const Request* request) { return run(*request, pyattr::cuda::gaussian_project); }
const char* hadamard_project(const Request* request) { return run(*request, pyattr::cuda::hadamard_project); }
size_t sparse_project_workspace(const Request* request) { return pyattr::cuda::sparse_project_workspace(request->args); }
const char* sparse_project(const Request* request) { return run(*request, pyattr::cuda::sparse_project); }
}
