#if defined(PYATTR_WITH_CUDA)
#include "group_norm_silu_jvp.h"

#include <pybind11/stl.h>

#include "bind/bind.h"
#include "bind/group_norm_args.h"
#include "bind/project_cuda.h"

void bind_group_norm_silu_jvp_cuda(pybind11::module_& m) {
  using namespace pyattr;
  m.def("group_norm_silu_jvp_cuda_workspace",
        [](int dtype, std::array<int64_t, 5> shape, const bind::GroupNormArrays& arrays, uintptr_t weight, uintptr_t bias,
           double eps, bool silu) {
          return cuda::group_norm_silu_jvp_workspace(bind::group_norm_args(dtype, shape, arrays, weight, bias, eps, silu));
        });
  m.def("group_norm_silu_jvp_cuda",
        [](int dtype, std::array<int64_t, 5> shape, const bind::GroupNormArrays& arrays, uintptr_t weight, uintptr_t bias,
           double eps, bool silu, uintptr_t workspace_address, size_t workspace_bytes, uintptr_t cuda_stream, int device) {
          const GroupNormSiluJvpArgs args = bind::group_norm_args(dtype, shape, arrays, weight, bias, eps, silu);
          bind::run_on_device(args, cuda::group_norm_silu_jvp, cuda::group_norm_silu_jvp_workspace, workspace_address,
                              workspace_bytes, cuda_stream, device);
        });
}
#endif
