#include "hadamard_project.h"

#include "bind/bind.h"
#include "bind/hadamard_args.h"

void bind_hadamard_project(pybind11::module_& m) {
  m.def("hadamard_project_cpu",
        [](uintptr_t grads, int dtype, int64_t num_samples, int64_t num_columns, int64_t sample_stride, int64_t column_stride,
           uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream, float scale, int num_threads) {
          const pyattr::ProjectArgs args = pyattr::bind::hadamard_args(grads, dtype, num_samples, num_columns, sample_stride,
                                                                       column_stride, out, proj_dim, seed, stream, scale);
          pybind11::gil_scoped_release release;
          pyattr::cpu::hadamard_project(args, num_threads);
        });
}
