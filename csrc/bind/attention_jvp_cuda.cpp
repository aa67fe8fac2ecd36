#if defined(PYATTR_WITH_CUDA)
#include "attention_jvp.h"

#include <pybind11/stl.h>

#include "bind/attention_args.h"
#include "bind/bind.h"
#include "bind/project_cuda.h"

void bind_attention_jvp_cuda(pybind11::module_& m) {
  m.def("attention_jvp_cuda", [](std::array<pyattr::bind::OperandNumbers, 6> operands, int dtype, uintptr_t mask, int mask_kind,
                                 std::array<int64_t, 4> mask_strides, std::array<int64_t, 7> sizes, bool causal, float scale,
                                 uintptr_t y, uintptr_t y_dot, uintptr_t cuda_stream, int device) {
    const pyattr::AttentionJvpArgs args = pyattr::bind::attention_args(
        {operands, dtype, mask, mask_kind, mask_strides, sizes, causal, scale, y, y_dot});
    pybind11::gil_scoped_release release;
    const pyattr::bind::DeviceGuard guard(device);
    pyattr::cuda::attention_jvp(args, reinterpret_cast<CUstream_st*>(cuda_stream));
  });
}
#endif
