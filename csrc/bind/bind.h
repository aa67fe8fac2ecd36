// One function per op: it adds the op's kernels to the module.
#pragma once

#include <pybind11/pybind11.h>

void bind_rademacher_project(pybind11::module_& m);
void bind_group_norm_silu_jvp(pybind11::module_& m);
void bind_hadamard_project(pybind11::module_& m);
void bind_gaussian_project(pybind11::module_& m);
void bind_sparse_project(pybind11::module_& m);
void bind_layer_sketch(pybind11::module_& m);
void bind_attention_jvp(pybind11::module_& m);
void bind_patch_mean(pybind11::module_& m);
void bind_patch_topk(pybind11::module_& m);
#if defined(PYATTR_WITH_CUDA)
void bind_rademacher_project_cuda(pybind11::module_& m);
void bind_group_norm_silu_jvp_cuda(pybind11::module_& m);
void bind_hadamard_project_cuda(pybind11::module_& m);
void bind_gaussian_project_cuda(pybind11::module_& m);
void bind_sparse_project_cuda(pybind11::module_& m);
void bind_attention_jvp_cuda(pybind11::module_& m);
void bind_patch_mean_cuda(pybind11::module_& m);
void bind_patch_topk_cuda(pybind11::module_& m);
#endif
