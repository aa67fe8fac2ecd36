#include "cpu/layer_sketch.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "bind/bind.h"
#include "bind/sketch_args.h"

namespace {

using Five = std::array<int64_t, 5>;
using Two = std::array<int64_t, 2>;

// What the kernels would read must lie where the strides say it does; sizes that contradict each other are refused here.
pyattr::LayerArgs layer_args(uintptr_t acts, const Five& acts_sizes, const Five& acts_strides, uintptr_t errs,
                             const Five& errs_sizes, const Five& errs_strides, const Two& kernel, const Two& stride,
                             const Two& padding, const Two& dilation, int64_t groups) {
  const auto require = [](bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
  };
  pyattr::LayerArgs args{};
  args.acts = reinterpret_cast<const float*>(acts);
  args.errs = reinterpret_cast<const float*>(errs);
  for (int i = 0; i < 5; ++i) {
    require(acts_sizes[i] >= 0 && errs_sizes[i] >= 0, "sizes must not be negative");
    args.acts_strides[i] = acts_strides[i];
    args.errs_strides[i] = errs_strides[i];
  }
  for (int i = 0; i < 2; ++i) {
    require(kernel[i] >= 1 && stride[i] >= 1 && dilation[i] >= 1 && padding[i] >= 0, "kernel, stride, padding or dilation is out of range");
    const int64_t reach = acts_sizes[3 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    require(errs_sizes[3 + i] == 0 || (reach >= 0 && errs_sizes[3 + i] <= reach / stride[i] + 1),
            "errs has more positions than the kernel has places");
    args.kernel[i] = kernel[i], args.stride[i] = stride[i], args.padding[i] = padding[i], args.dilation[i] = dilation[i];
  }
  require(acts_sizes[0] == errs_sizes[0] && acts_sizes[1] == errs_sizes[1], "acts and errs must have as many samples and views");
  const auto empty = [](const Five& sizes) { return sizes[0] * sizes[1] * sizes[2] * sizes[3] * sizes[4] == 0; };
  require((acts != 0 || empty(acts_sizes)) && (errs != 0 || empty(errs_sizes)), "acts or errs is a null address");
  require(groups >= 1 && acts_sizes[2] % groups == 0 && errs_sizes[2] % groups == 0, "groups must divide the channels");
  args.num_samples = acts_sizes[0], args.num_views = acts_sizes[1], args.channels = acts_sizes[2];
  args.height = acts_sizes[3], args.width = acts_sizes[4];
  args.out_channels = errs_sizes[2], args.out_height = errs_sizes[3], args.out_width = errs_sizes[4];
  args.groups = groups;
  return args;
}

}  // namespace

void bind_layer_sketch(pybind11::module_& m) {
  m.def("layer_gradient_cpu",
        [](uintptr_t acts, const Five& acts_sizes, const Five& acts_strides, uintptr_t errs, const Five& errs_sizes,
           const Five& errs_strides, const Two& kernel, const Two& stride, const Two& padding, const Two& dilation,
           int64_t groups, uintptr_t out, int64_t out_stride, bool add, int num_threads) {
          const pyattr::LayerArgs layer = layer_args(acts, acts_sizes, acts_strides, errs, errs_sizes, errs_strides, kernel,
                                                     stride, padding, dilation, groups);
          if (out == 0 && layer.num_samples * layer.row_columns() * layer.out_channels > 0)
            throw std::invalid_argument("out is a null address");
          pybind11::gil_scoped_release release;
          pyattr::cpu::layer_gradient(layer, reinterpret_cast<float*>(out), out_stride, add, num_threads);
        });
  m.def("layer_sketch_cpu",
        [](uintptr_t acts, const Five& acts_sizes, const Five& acts_strides, uintptr_t errs, const Five& errs_sizes,
           const Five& errs_strides, const Two& kernel, const Two& stride, const Two& padding, const Two& dilation,
           int64_t groups, uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream, int64_t column_offset, int nonzeros,
           int num_threads) {
          const pyattr::LayerArgs layer = layer_args(acts, acts_sizes, acts_strides, errs, errs_sizes, errs_strides, kernel,
                                                     stride, padding, dilation, groups);
          const int64_t columns = layer.out_channels * layer.row_columns();
          pyattr::SketchArgs sketch = pyattr::bind::sketch_args(0, 2, 0, columns, 0, 0, out, proj_dim, seed, stream,
                                                                column_offset, nonzeros, 1.0f);
          if (out == 0 && layer.num_samples > 0) throw std::invalid_argument("out is a null address");
          pybind11::gil_scoped_release release;
          pyattr::cpu::layer_sketch(layer, sketch, num_threads);
        });
}
