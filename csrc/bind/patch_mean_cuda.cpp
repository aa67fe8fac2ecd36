#if defined(PYATTR_WITH_CUDA)
#include "patch_mean.h"

#include <pybind11/stl.h>

#include "bind/bind.h"
#include "bind/patch_mean_args.h"
#include "bind/project_cuda.h"

void bind_patch_mean_cuda(pybind11::module_& m) {
  using namespace pyattr;
  m.def("patch_mean_cuda_workspace",
        [](uintptr_t query, uintptr_t bank, int pixel, std::array<int64_t, 4> bank_strides, std::array<int64_t, 4> bank_shape,
           std::array<int64_t, 2> query_size, int64_t patch_size, int border, bool lowres, double scale, double inverse,
           std::array<int64_t, 4> part, int64_t stats_stride, uintptr_t minima, uintptr_t sums, uintptr_t pixels) {
          return cuda::patch_mean_workspace(bind::patch_mean_args(
              {query, bank, pixel, bank_strides, bank_shape, query_size, patch_size, border, lowres, scale, inverse, part},
              stats_stride, minima, sums, pixels));
        });
  m.def("patch_mean_cuda",
        [](uintptr_t query, uintptr_t bank, int pixel, std::array<int64_t, 4> bank_strides, std::array<int64_t, 4> bank_shape,
           std::array<int64_t, 2> query_size, int64_t patch_size, int border, bool lowres, double scale, double inverse,
           std::array<int64_t, 4> part, int64_t stats_stride, uintptr_t minima, uintptr_t sums, uintptr_t pixels,
           uintptr_t workspace_address, size_t workspace_bytes, uintptr_t cuda_stream, int device) {
          const PatchMeanArgs args = bind::patch_mean_args(
              {query, bank, pixel, bank_strides, bank_shape, query_size, patch_size, border, lowres, scale, inverse, part},
              stats_stride, minima, sums, pixels);
          bind::run_on_device(args, cuda::patch_mean, cuda::patch_mean_workspace, workspace_address, workspace_bytes, cuda_stream,
                              device);
        });
}
#endif
