#include "sparse_project.h"

#include "bind/bind.h"
#include "bind/sketch_args.h"

void bind_sparse_project(pybind11::module_& m) {
  const auto define = [&m](const char* name, void (*run)(const pyattr::SketchArgs&, int)) {
    m.def(name, [run](uintptr_t grads, int dtype, int64_t num_samples, int64_t num_columns, int64_t sample_stride,
                      int64_t column_stride, uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream,
                      int64_t column_offset, int nonzeros, float scale, int num_threads) {
      const pyattr::SketchArgs args =
          pyattr::bind::sketch_args(grads, dtype, num_samples, num_columns, sample_stride, column_stride, out, proj_dim,
                                    seed, stream, column_offset, nonzeros, scale);
      pybind11::gil_scoped_release release;
      run(args, num_threads);
    });
  };
  define("sparse_project_cpu", pyattr::cpu::sparse_project);
  define("sparse_project_transpose_cpu", pyattr::cpu::sparse_project_transpose);
}
