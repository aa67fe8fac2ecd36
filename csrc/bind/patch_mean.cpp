#include "patch_mean.h"

#include <pybind11/stl.h>

#include "bind/bind.h"
#include "bind/patch_mean_args.h"

void bind_patch_mean(pybind11::module_& m) {
  m.def("patch_mean_cpu", [](uintptr_t query, uintptr_t bank, int pixel, std::array<int64_t, 4> bank_strides,
                             std::array<int64_t, 4> bank_shape, std::array<int64_t, 2> query_size, int64_t patch_size, int border,
                             bool lowres, double scale, double inverse, std::array<int64_t, 4> part, int64_t stats_stride,
                             uintptr_t minima, uintptr_t sums, uintptr_t pixels, int num_threads) {
    const pyattr::PatchMeanArgs args = pyattr::bind::patch_mean_args(
        {query, bank, pixel, bank_strides, bank_shape, query_size, patch_size, border, lowres, scale, inverse, part}, stats_stride,
        minima, sums, pixels);
    pybind11::gil_scoped_release release;
    pyattr::cpu::patch_mean(args, num_threads);
  });
  m.def("patch_mean_join_cpu", [](uintptr_t minima, uintptr_t sums, uintptr_t pixels, int64_t positions, int64_t num_images,
                                  int64_t channels, double inverse, uintptr_t least, uintptr_t total, uintptr_t mean,
                                  int num_threads) {
    pyattr::bind::require(positions >= 0 && num_images >= 0 && channels >= 0, "sizes must not be negative");
    const bool given = minima != 0 && sums != 0 && pixels != 0 && least != 0 && total != 0 && mean != 0;
    pyattr::bind::require(given || positions == 0 || num_images == 0 || channels == 0, "an array is a null address");
    const pyattr::PatchMeanJoinArgs args{reinterpret_cast<const float*>(minima), reinterpret_cast<const float*>(sums),
                                         reinterpret_cast<const float*>(pixels), positions, num_images, channels, inverse,
                                         reinterpret_cast<double*>(least), reinterpret_cast<double*>(total),
                                         reinterpret_cast<double*>(mean)};
    pybind11::gil_scoped_release release;
    pyattr::cpu::patch_mean_join(args, num_threads);
  });
}
