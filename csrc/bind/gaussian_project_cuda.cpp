#if defined(PYATTR_WITH_CUDA)
#include "gaussian_project.h"

#include "bind/bind.h"
#include "bind/project_cuda.h"

void bind_gaussian_project_cuda(pybind11::module_& m) {
  constexpr int64_t kMaxColumns = int64_t{1} << 34;  // what the Philox counter's 32 bits reach
  pyattr::bind::bind_project_cuda(m, "gaussian_project", kMaxColumns, pyattr::cuda::gaussian_project,
                                  pyattr::cuda::gaussian_project_workspace);
}
#endif
