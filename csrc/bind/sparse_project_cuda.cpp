#if defined(PYATTR_WITH_CUDA)
#include "sparse_project.h"

#include "bind/bind.h"
#include "bind/project_cuda.h"
#include "bind/sketch_args.h"

void bind_sparse_project_cuda(pybind11::module_& m) {
  using namespace pyattr;
  m.def("sparse_project_cuda_workspace",
        [](uintptr_t grads, int dtype, int64_t num_samples, int64_t num_columns, int64_t sample_stride, int64_t column_stride,
           uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream, int64_t column_offset, int nonzeros, float scale) {
          return cuda::sparse_project_workspace(bind::sketch_args(grads, dtype, num_samples, num_columns, sample_stride,
                                                                  column_stride, out, proj_dim, seed, stream, column_offset,
                                                                  nonzeros, scale));
        });
  m.def("sparse_project_cuda",
        [](uintptr_t grads, int dtype, int64_t num_samples, int64_t num_columns, int64_t sample_stride, int64_t column_stride,
           uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream, int64_t column_offset, int nonzeros, float scale,
           uintptr_t workspace_address, size_t workspace_bytes, uintptr_t cuda_stream, int device) {
          const SketchArgs args = bind::sketch_args(grads, dtype, num_samples, num_columns, sample_stride, column_stride, out,
                                                    proj_dim, seed, stream, column_offset, nonzeros, scale);
          bind::run_on_device(args, cuda::sparse_project, cuda::sparse_project_workspace, workspace_address, workspace_bytes,
                              cuda_stream, device);
        });
}
#endif
