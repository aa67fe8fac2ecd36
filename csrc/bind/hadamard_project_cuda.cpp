#if defined(PYATTR_WITH_CUDA)
#include "hadamard_project.h"

#include "bind/bind.h"
#include "bind/hadamard_args.h"
#include "bind/project_cuda.h"

void bind_hadamard_project_cuda(pybind11::module_& m) {
  m.def("hadamard_project_cuda_workspace",
        [](uintptr_t grads, int dtype, int64_t num_samples, int64_t num_columns, int64_t sample_stride, int64_t column_stride,
           uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream, float scale) {
          return pyattr::cuda::hadamard_project_workspace(pyattr::bind::hadamard_args(
              grads, dtype, num_samples, num_columns, sample_stride, column_stride, out, proj_dim, seed, stream, scale));
        });
  m.def("hadamard_project_cuda",
        [](uintptr_t grads, int dtype, int64_t num_samples, int64_t num_columns, int64_t sample_stride, int64_t column_stride,
           uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream, float scale, uintptr_t workspace_address,
           size_t workspace_bytes, uintptr_t cuda_stream, int device) {
          const pyattr::ProjectArgs args = pyattr::bind::hadamard_args(grads, dtype, num_samples, num_columns, sample_stride,
                                                                       column_stride, out, proj_dim, seed, stream, scale);
          pyattr::bind::run_on_device(args, pyattr::cuda::hadamard_project, pyattr::cuda::hadamard_project_workspace,
                                      workspace_address, workspace_bytes, cuda_stream, device);
        });
}
#endif
