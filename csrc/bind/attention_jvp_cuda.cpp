#if defined(PYATTR_WITH_CUDA)
#include "attention_jvp.h"

#include <pybind11/stl.h>

#include "bind/attention_args.h"
#include "bind/bind.h"
#include "bind/project_cuda.h"

void bind_attention_jvp_cuda(pybind11::module_& m) {
  using namespace pyattr;
  m.def("attention_jvp_cuda_workspace",
        [](std::array<bind::OperandNumbers, 6> operands, int dtype, uintptr_t mask, int mask_kind,
           std::array<int64_t, 4> mask_strides, std::array<int64_t, 7> sizes, bool causal, float scale, uintptr_t y, uintptr_t y_dot) {
          return cuda::attention_jvp_workspace(
              bind::attention_args({operands, dtype, mask, mask_kind, mask_strides, sizes, causal, scale, y, y_dot}));
        });
  m.def("attention_jvp_cuda",
        [](std::array<bind::OperandNumbers, 6> operands, int dtype, uintptr_t mask, int mask_kind,
           std::array<int64_t, 4> mask_strides, std::array<int64_t, 7> sizes, bool causal, float scale, uintptr_t y, uintptr_t y_dot,
           uintptr_t workspace_address, size_t workspace_bytes, uintptr_t cuda_stream, int device) {
          const AttentionJvpArgs args =
              bind::attention_args({operands, dtype, mask, mask_kind, mask_strides, sizes, causal, scale, y, y_dot});
          bind::run_on_device(args, cuda::attention_jvp, cuda::attention_jvp_workspace, workspace_address, workspace_bytes,
                              cuda_stream, device);
        });
}
#endif
