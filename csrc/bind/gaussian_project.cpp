#include "gaussian_project.h"

#include "bind/bind.h"
#include "bind/project_args.h"

namespace {
constexpr int64_t kMaxColumns = int64_t{1} << 34;  // what the Philox counter's 32 bits reach
}

void bind_gaussian_project(pybind11::module_& m) {
  m.def(
      "gaussian_project_cpu",
      [](uintptr_t grads, int dtype, int64_t num_samples, int64_t num_columns, int64_t sample_stride, int64_t column_stride,
         uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream, int64_t column_offset, float scale,
         int num_threads) {
        const pyattr::ProjectArgs args =
            pyattr::bind::project_args(grads, dtype, num_samples, num_columns, sample_stride, column_stride, out, proj_dim,
                                       seed, stream, column_offset, scale, kMaxColumns);
        pybind11::gil_scoped_release release;
        pyattr::cpu::gaussian_project(args, num_threads);
      });
}
