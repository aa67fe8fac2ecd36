// From PatchArgs to launches: the windows and their tiles, the scratch, a few images at a time.
#pragma once

#include <algorithm>

#include "cuda/patch_tile.cuh"

namespace pyattr::cuda {

inline PatchAxis patch_axis(const PatchArgs& args, int64_t query_size, int64_t image_size, int64_t begin, int64_t end) {
  PatchAxis axis{};
  axis.begin = static_cast<int>(begin);
  axis.end = static_cast<int>(end);
  if (args.border != Border::cut_alike) {
    axis.first = axis.begin;
    axis.whole = axis.end - axis.begin;
    axis.image_whole = static_cast<int>(args.grid(image_size));
    return axis;
  }
  const Interior inside = interior(query_size, args.patch_size);
  axis.image_first = static_cast<int>(inside.first);
  axis.image_whole = static_cast<int>(inside.last - inside.first);
  axis.first = static_cast<int>(std::clamp(inside.first, begin, end));
  axis.whole = static_cast<int>(std::clamp(inside.last, begin, end)) - axis.first;
  return axis;
}

struct PatchPlan {
  PatchGeometry geometry;
  int64_t num_tiles, samples;             // floats of the samples
  int rows, columns, query_rows, query_columns;  // of a plane
  int64_t together;                       // images at a time
  int64_t tile_floats, blocks;            // of a tile of distances; thread blocks that have one
  bool shared;                            // in shared memory
};

inline PatchPlan plan_patches(const PatchArgs& args) {
  PatchPlan plan{};
  PatchGeometry& g = plan.geometry;
  g.channels = static_cast<int>(args.channels);
  g.pad = static_cast<int>(args.padding());
  g.blocks = args.lowres;
  g.step = args.lowres ? 2 : 1;
  g.taps = static_cast<int>(args.patch_size) / g.step;
  g.rows = patch_axis(args, args.query_height, args.height, args.row_begin, args.row_end);
  g.columns = patch_axis(args, args.query_width, args.width, args.column_begin, args.column_end);
  g.image_columns = static_cast<int>(args.grid(args.width));
  const auto extent = [&](int64_t size) { return static_cast<int>(args.grid(size)) + (g.taps - 1) * g.step; };
  plan.rows = extent(args.height), plan.columns = extent(args.width);
  plan.query_rows = extent(args.query_height), plan.query_columns = extent(args.query_width);
  plan.num_tiles = patch_tiles(g);
  plan.samples = plan.num_tiles * patch_samples(g) * kPatchRows;
  const int64_t image = static_cast<int64_t>(g.channels) * plan.rows * plan.columns;
  plan.together = std::clamp(kPatchPlaneFloats / std::max<int64_t>(image, 1), int64_t{1}, std::max<int64_t>(args.num_images, 1));
  plan.tile_floats = int64_t{kPatchRows} * std::max(g.rows.image_whole, 1) * std::max(g.columns.image_whole, 1);
  plan.shared = plan.tile_floats * static_cast<int64_t>(sizeof(float)) <= kPatchShared;
  plan.blocks = plan.shared ? kPatchGrid : std::clamp(kPatchTileFloats / plan.tile_floats, int64_t{1}, kPatchTileBlocks);
  return plan;
}

inline int64_t patch_plane_floats(const PatchPlan& plan, int64_t images) {
  return images * plan.geometry.channels * plan.rows * plan.columns;
}
inline int64_t patch_query_floats(const PatchPlan& plan) {
  return static_cast<int64_t>(plan.geometry.channels) * plan.query_rows * plan.query_columns;
}

inline size_t patch_workspace(const PatchArgs& args) {
  if (args.num_images == 0 || args.positions() == 0) return 0;
  const PatchPlan plan = plan_patches(args);
  const int64_t floats = patch_query_floats(plan) + plan.samples + patch_plane_floats(plan, plan.together) +
                         (plan.shared ? 0 : plan.blocks * plan.tile_floats);
  return static_cast<size_t>(floats) * sizeof(float);
}

// Fills `task` with what every kernel takes and runs them; what comes out is the caller's to set, for the first image.
template <class Row>
void run_patches(const char* op, const PatchArgs& args, PatchTask task, void* workspace, cudaStream_t stream) {
  if (args.num_images == 0 || args.positions() == 0) return;
  const PatchPlan plan = plan_patches(args);
  const PatchGeometry& g = plan.geometry;
  float* const query = static_cast<float*>(workspace);
  float* const samples = query + patch_query_floats(plan);
  float* const planes = samples + plan.samples;

  const PatchImages queries{reinterpret_cast<const unsigned char*>(args.query),
                            Pixel::float32,
                            {0, args.query_height * args.query_width, args.query_width, 1},
                            static_cast<int>(args.query_height),
                            static_cast<int>(args.query_width)};
  patch_launch(op, patch_planes_kernel, {queries, g, plan.query_rows, plan.query_columns, 1, query},
               patch_blocks(patch_query_floats(plan)), 0, stream);
  patch_launch(op, patch_samples_kernel, {g, plan.query_rows, plan.query_columns, query, plan.num_tiles, samples},
               patch_blocks(plan.samples), 0, stream);

  task.geometry = g;
  task.num_tiles = plan.num_tiles;
  task.rows = plan.rows, task.columns = plan.columns;
  task.planes = planes;
  task.samples = samples;
  task.scale = static_cast<float>(args.scale);
  task.rate = static_cast<float>(args.inverse * 1.4426950408889634);
  task.tile_floats = plan.tile_floats;
  task.tiles = plan.shared ? nullptr : planes + patch_plane_floats(plan, plan.together);
  task.positions = args.positions();
  task.stats_stride = args.stats_stride;
  const size_t shared = plan.shared ? static_cast<size_t>(plan.tile_floats) * sizeof(float) : 0;
  const auto kernel = patch_difference_kernel<Row>;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kPatchShared)),
        op, "reserving shared memory");
  for (int64_t image = 0; image < args.num_images; image += plan.together) {
    task.num_images = std::min(plan.together, args.num_images - image);
    const int64_t bytes = args.pixel == Pixel::uint8 ? 1 : args.pixel == Pixel::float32 ? 4 : 2;
    PatchImages images{static_cast<const unsigned char*>(args.bank) + image * args.bank_strides[0] * bytes, args.pixel, {},
                       static_cast<int>(args.height), static_cast<int>(args.width)};
    std::copy(args.bank_strides, args.bank_strides + 4, images.strides);
    patch_launch(op, patch_planes_kernel, {images, g, plan.rows, plan.columns, task.num_images, planes},
                 patch_blocks(patch_plane_floats(plan, task.num_images)), 0, stream);
    patch_launch(op, kernel, task, std::min(plan.blocks, task.num_images * plan.num_tiles), shared, stream);
    task.minima += task.num_images, task.sums += task.num_images;
    if (task.tops != nullptr) task.tops += task.num_images;
    if (task.nearest != nullptr) task.nearest += task.num_images;
    if (task.pixels != nullptr) task.pixels += task.num_images;
  }
}

}  // namespace pyattr::cuda
