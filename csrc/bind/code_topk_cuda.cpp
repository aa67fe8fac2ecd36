#if defined(PYATTR_WITH_CUDA)
#include "bind/bind.h"
#include "bind/project_cuda.h"
#include "code_topk.h"

void bind_code_topk_cuda(pybind11::module_& m) {
  m.def("code_topk_cuda", [](uintptr_t codes, int64_t num_codes, int members, uintptr_t rows, uintptr_t limits, bool largest,
                             uintptr_t flags, uintptr_t cuda_stream, int device) {
    if (num_codes < 0 || members < 2 || members > pyattr::kCodeMembers) {
      throw std::invalid_argument("num_codes must not be negative, members lie in [2, 64]");
    }
    if (num_codes > 0 && (codes == 0 || rows == 0 || limits == 0 || flags == 0)) {
      throw std::invalid_argument("an array is a null address");
    }
    if (codes % sizeof(uint64_t) != 0 || rows % 4 != 0) throw std::invalid_argument("an array is not aligned");
    const pyattr::CodeFlagsArgs args{reinterpret_cast<const uint64_t*>(codes), num_codes, members,
                                     reinterpret_cast<const int8_t*>(rows), reinterpret_cast<const float*>(limits), largest,
                                     reinterpret_cast<uint8_t*>(flags)};
    pybind11::gil_scoped_release release;
    const pyattr::bind::DeviceGuard guard(device);
    pyattr::cuda::code_topk(args, reinterpret_cast<CUstream_st*>(cuda_stream));
  });
}
#endif
