#if defined(PYATTR_WITH_CUDA)
#include "group_norm_silu_jvp.h"

#include <pybind11/stl.h>

#include "bind/bind.h"
#include "bind/group_norm_args.h"
#include "bind/project_cuda.h"

void bind_group_norm_silu_jvp_cuda(pybind11::module_& m) {
  using namespace pyattr;
  m.def("group_norm_silu_jvp_cuda", [](int dtype, std::array<int64_t, 5> shape, const bind::GroupNormArrays& arrays,
                                       uintptr_t weight, uintptr_t bias, double eps, bool silu, uintptr_t cuda_stream,
                                       int device) {
    const GroupNormSiluJvpArgs args = bind::group_norm_args(dtype, shape, arrays, weight, bias, eps, silu);
    pybind11::gil_scoped_release release;
    const bind::DeviceGuard guard(device);
    cuda::group_norm_silu_jvp(args, reinterpret_cast<CUstream_st*>(cuda_stream));
  });
}
#endif
