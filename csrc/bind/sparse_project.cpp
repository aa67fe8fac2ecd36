#include "sparse_project.h"

#include "bind/bind.h"
#include "bind/sketch_args.h"

void bind_sparse_project(pybind11::module_& m) {
  m.def("sparse_project_cpu",
        [](uintptr_t grads, int dtype, int64_t num_samples, int64_t num_columns, int64_t sample_stride, int64_t column_stride,
           uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream, int64_t column_offset, int nonzeros, float scale,
           int num_threads) {
          const pyattr::SketchArgs args =
              pyattr::bind::sketch_args(grads, dtype, num_samples, num_columns, sample_stride, column_stride, out, proj_dim,
                                        seed, stream, column_offset, nonzeros, scale);
          pybind11::gil_scoped_release release;
          pyattr::cpu::sparse_project(args, num_threads);
        });
}
