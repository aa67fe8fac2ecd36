#include "group_norm_silu_jvp.h"

#include <pybind11/stl.h>

#include "bind/bind.h"
#include "bind/group_norm_args.h"

void bind_group_norm_silu_jvp(pybind11::module_& m) {
  m.def("group_norm_silu_jvp_cpu", [](int dtype, std::array<int64_t, 5> shape, const pyattr::bind::GroupNormArrays& arrays,
                                      uintptr_t weight, uintptr_t bias, double eps, bool silu, int num_threads) {
    const pyattr::GroupNormSiluJvpArgs args = pyattr::bind::group_norm_args(dtype, shape, arrays, weight, bias, eps, silu);
    pybind11::gil_scoped_release release;
    pyattr::cpu::group_norm_silu_jvp(args, num_threads);
  });
}
