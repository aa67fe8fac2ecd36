#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/bind.h"
#include "common/simd_level.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of pyattr: addresses, sizes, strides and dtypes in, nothing of torch.";
  m.attr("__version__") = PYATTR_VERSION;
  m.def("simd_level", [] { return std::string(pyattr::name(pyattr::simd_level())); });
  m.def("simd_levels", [] {
    std::vector<std::string> names;
    for (pyattr::SimdLevel level : pyattr::simd_levels()) names.emplace_back(pyattr::name(level));
    return names;
  });
  bind_rademacher_project(m);
  bind_group_norm_silu_jvp(m);
  bind_hadamard_project(m);
  bind_gaussian_project(m);
  bind_sparse_project(m);
  bind_layer_sketch(m);
  bind_attention_jvp(m);
  bind_patch_mean(m);
  bind_patch_topk(m);
#if defined(PYATTR_WITH_CUDA)
  m.attr("built_with_cuda") = true;
  bind_rademacher_project_cuda(m);
  bind_group_norm_silu_jvp_cuda(m);
  bind_hadamard_project_cuda(m);
  bind_gaussian_project_cuda(m);
  bind_sparse_project_cuda(m);
  bind_attention_jvp_cuda(m);
  bind_patch_mean_cuda(m);
  bind_patch_topk_cuda(m);
#else
  m.attr("built_with_cuda") = false;
#endif
}
