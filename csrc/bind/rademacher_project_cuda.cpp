#if defined(PYATTR_WITH_CUDA)
#include "rademacher_project.h"

#include "bind/bind.h"
#include "bind/project_cuda.h"

void bind_rademacher_project_cuda(pybind11::module_& m) {
  constexpr int64_t kMaxColumns = int64_t{1} << 39;  // what the Philox counter's 32 bits reach
  pyattr::bind::bind_project_cuda(m, "rademacher_project", kMaxColumns, pyattr::cuda::rademacher_project,
                                  pyattr::cuda::rademacher_project_workspace);
}
#endif
