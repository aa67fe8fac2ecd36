#include "patch_topk.h"

#include <pybind11/stl.h>

#include "bind/bind.h"
#include "bind/patch_topk_args.h"

void bind_patch_topk(pybind11::module_& m) {
  m.def("patch_topk_cpu", [](uintptr_t query, uintptr_t bank, int pixel, std::array<int64_t, 4> bank_strides,
                             std::array<int64_t, 4> bank_shape, std::array<int64_t, 2> query_size, int64_t patch_size, int border,
                             bool lowres, double scale, double inverse, std::array<int64_t, 4> part, int64_t stats_stride, int64_t k,
                             uintptr_t minima, uintptr_t sums, uintptr_t tops, uintptr_t nearest, int num_threads) {
    const pyattr::PatchTopkArgs args = pyattr::bind::patch_topk_args(
        {query, bank, pixel, bank_strides, bank_shape, query_size, patch_size, border, lowres, scale, inverse, part}, stats_stride, k,
        minima, sums, tops, nearest);
    pybind11::gil_scoped_release release;
    pyattr::cpu::patch_topk(args, num_threads);
  });
  m.def("patch_join_cpu", [](uintptr_t minima, uintptr_t sums, uintptr_t tops, int64_t positions, int64_t num_images, double inverse,
                             uintptr_t log_normaliser, uintptr_t nearest_weights, uintptr_t weights, int num_threads) {
    pyattr::bind::require(positions >= 0 && num_images >= 0, "sizes must not be negative");
    const bool given = minima != 0 && sums != 0 && tops != 0 && log_normaliser != 0 && weights != 0;
    pyattr::bind::require(given || positions == 0 || num_images == 0, "an array is a null address");
    const pyattr::PatchJoinArgs args{reinterpret_cast<const float*>(minima), reinterpret_cast<const float*>(sums),
                                     reinterpret_cast<float*>(tops), positions, num_images, inverse,
                                     reinterpret_cast<double*>(log_normaliser), reinterpret_cast<double*>(nearest_weights),
                                     reinterpret_cast<double*>(weights)};
    pybind11::gil_scoped_release release;
    pyattr::cpu::patch_join(args, num_threads);
  });
}
