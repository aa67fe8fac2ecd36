// The CUDA kernels of a projection from Python: the device and stream they run on, the scratch they are given.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bind/project_args.h"

namespace pyattr::bind {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
}

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// Runs a projection with a workspace that is checked to be large enough.
template <class Args>
void run_on_device(const Args& args, void (*project)(const Args&, void*, CUstream_st*), size_t (*workspace)(const Args&),
                   uintptr_t workspace_address, size_t workspace_bytes, uintptr_t cuda_stream, int device) {
  const size_t needed = workspace(args);
  if (workspace_bytes < needed || (needed > 0 && workspace_address == 0)) {
    throw std::invalid_argument("workspace_bytes must be at least " + std::to_string(needed) + ", got " +
                                std::to_string(workspace_bytes));
  }
  pybind11::gil_scoped_release release;
  const DeviceGuard guard(device);
  project(args, reinterpret_cast<void*>(workspace_address), reinterpret_cast<CUstream_st*>(cuda_stream));
}

// A dense projection as two Python functions: NAME_cuda and NAME_cuda_workspace.
inline void bind_project_cuda(pybind11::module_& m, const std::string& name, int64_t max_columns,
                              void (*project)(const ProjectArgs&, void*, CUstream_st*), size_t (*workspace)(const ProjectArgs&)) {
  m.def((name + "_cuda_workspace").c_str(),
        [=](uintptr_t grads, int dtype, int64_t num_samples, int64_t num_columns, int64_t sample_stride, int64_t column_stride,
            uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream, int64_t column_offset, float scale) {
          return workspace(project_args(grads, dtype, num_samples, num_columns, sample_stride, column_stride, out, proj_dim, seed,
                                        stream, column_offset, scale, max_columns));
        });
  m.def((name + "_cuda").c_str(),
        [=](uintptr_t grads, int dtype, int64_t num_samples, int64_t num_columns, int64_t sample_stride, int64_t column_stride,
            uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream, int64_t column_offset, float scale,
            uintptr_t workspace_address, size_t workspace_bytes, uintptr_t cuda_stream, int device) {
          const ProjectArgs args = project_args(grads, dtype, num_samples, num_columns, sample_stride, column_stride, out,
                                                proj_dim, seed, stream, column_offset, scale, max_columns);
          run_on_device(args, project, workspace, workspace_address, workspace_bytes, cuda_stream, device);
        });
}

}  // namespace pyattr::bind
