#include "attention_jvp.h"

#include <pybind11/stl.h>

#include "bind/attention_args.h"
#include "bind/bind.h"

void bind_attention_jvp(pybind11::module_& m) {
  m.def("attention_jvp_cpu", [](std::array<pyattr::bind::OperandNumbers, 6> operands, int dtype, uintptr_t mask, int mask_kind,
                                std::array<int64_t, 4> mask_strides, std::array<int64_t, 7> sizes, bool causal, float scale,
                                uintptr_t y, uintptr_t y_dot, int num_threads) {
    const pyattr::AttentionJvpArgs args = pyattr::bind::attention_args(
        {operands, dtype, mask, mask_kind, mask_strides, sizes, causal, scale, y, y_dot});
    pybind11::gil_scoped_release release;
    pyattr::cpu::attention_jvp(args, num_threads);
  });
}
