// From PatchArgs to launches: the windows and their tiles, the scratch, a few images at a time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/patch_fixed.cuh"

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
  axis.image_whole = static_cast<int>(inside.last - inside.first);  // none, for a patch that is larger than the image
  axis.first = static_cast<int>(std::clamp(inside.first, begin, end));
  axis.whole = static_cast<int>(std::clamp(inside.last, begin, end)) - axis.first;
  return axis;
}

struct PatchPlan {
  PatchGeometry geometry;
  int64_t num_tiles, samples;                    // floats of the samples
  int rows, columns, query_rows, query_columns;  // of a plane
  int64_t together;                              // images at a time
  int64_t tile_floats, blocks;                   // of a tile of distances; thread blocks that have one
  bool shared;                                   // in shared memory
  int longest_cut;                               // windows of an image that a cut window meets, at most
  // The same on tensor cores.
  bool fixed;
  int groups, steps, layers, height, width;
  int64_t pairs, fixed_blocks;
  int64_t table_bytes;  // of shared memory
  bool fixed_shared;
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
  const auto slots = [](int64_t floats) { return std::clamp(kPatchTileFloats / floats, int64_t{1}, kPatchTileBlocks); };
  const int64_t windows = static_cast<int64_t>(g.rows.image_whole) * g.columns.image_whole;
  plan.tile_floats = kPatchRows * std::max<int64_t>(windows, 1);
  plan.longest_cut = std::max({g.rows.image_whole, g.columns.image_whole, 1});
  plan.shared = plan.tile_floats * static_cast<int64_t>(sizeof(float)) <= kPatchShared;
  plan.blocks = plan.shared ? kPatchGrid : slots(plan.tile_floats);

  plan.groups = (g.channels + 3) / 4;
  plan.steps = (plan.groups * g.taps * g.taps + 7) / 8;
  plan.pairs = plan.num_tiles / 2;
  PatchFixed sizes{};
  plan.layers = args.lowres ? 2 : 1;
  plan.height = static_cast<int>(args.height) - args.lowres, plan.width = static_cast<int>(args.width) - args.lowres;
  sizes.groups = plan.groups, sizes.steps = plan.steps, sizes.layers = plan.layers;
  sizes.height = plan.height, sizes.width = plan.width;
  plan.table_bytes = patch_fixed_tables(sizes, g) * static_cast<int64_t>(sizeof(float));
  plan.fixed = args.pixel == Pixel::uint8 && args.border != Border::zero && plan.pairs > 0 &&
               patch_samples(g) <= kPatchMostSamples && plan.table_bytes <= kPatchShared;
  const int64_t pair_floats = kPatchPair * windows;
  plan.fixed_shared = plan.table_bytes + pair_floats * static_cast<int64_t>(sizeof(float)) <= kPatchShared;
  plan.fixed_blocks = plan.fixed_shared ? kPatchGrid : slots(std::max<int64_t>(pair_floats, 1));
  return plan;
}

// The workspace, part by part; of a null address only the size.
struct PatchScratch {
  float *query, *samples, *planes, *tiles, *fixed_tiles;
  PatchPrecision* precision;
  uint4* limbs;
  int64_t* squares;
  uint32_t* words;
  size_t bytes = 0;

  PatchScratch(const PatchPlan& plan, void* workspace) {
    const PatchGeometry& g = plan.geometry;
    const auto take = [&](auto*& part, int64_t count) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(reinterpret_cast<uintptr_t>(workspace) + bytes);
      bytes += (static_cast<size_t>(count) * sizeof(*part) + 15) / 16 * 16;
    };
    take(query, static_cast<int64_t>(g.channels) * plan.query_rows * plan.query_columns);
    take(samples, plan.samples);
    take(planes, plan.together * g.channels * plan.rows * plan.columns);
    take(tiles, plan.shared ? 0 : plan.blocks * plan.tile_floats);
    take(precision, plan.fixed);
    take(limbs, plan.fixed ? plan.pairs * plan.steps * kPatchLimbs * 32 : 0);
    take(squares, plan.fixed ? plan.pairs * kPatchPair : 0);
    take(words, plan.fixed ? plan.together * plan.layers * plan.groups * plan.height * plan.width : 0);
    take(fixed_tiles,
         plan.fixed && !plan.fixed_shared ? plan.fixed_blocks * kPatchPair * g.rows.image_whole * g.columns.image_whole : 0);
  }
};

// The query's windows some rows at a time, so that their samples are bounded whatever the sizes of image and patch.
template <class Each>
void each_slab(const PatchArgs& args, Each use) {
  const int64_t samples = (args.column_end - args.column_begin) * args.channels * args.patch_size * args.patch_size;
  const int64_t together = std::max(kPatchPlaneFloats / std::max<int64_t>(samples, 1), int64_t{1});
  PatchArgs slab = args;
  for (int64_t row = args.row_begin; row < args.row_end; row = slab.row_end) {
    slab.row_begin = row;
    slab.row_end = std::min(row + together, args.row_end);
    use(slab);
  }
}

inline size_t patch_workspace(const PatchArgs& args) {
  size_t bytes = 0;
  if (args.num_images == 0 || args.positions() == 0) return bytes;
  each_slab(args, [&](const PatchArgs& slab) { bytes = std::max(bytes, PatchScratch(plan_patches(slab), nullptr).bytes); });
  return bytes;
}

template <class Task>
void patch_reserve(const char* op, void (*kernel)(Task)) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kPatchShared)),
        op, "reserving shared memory");
}

// Fills `task` with what every kernel takes and runs them; what comes out is the caller's to set, for the first image.
template <class Row>
void run_slab(const char* op, const PatchArgs& args, PatchTask task, void* workspace, cudaStream_t stream) {
  const PatchPlan plan = plan_patches(args);
  const PatchGeometry& g = plan.geometry;
  const size_t cut_shared = sizeof(float) * kPatchWarps * static_cast<size_t>(plan.longest_cut);
  if (cut_shared > static_cast<size_t>(kPatchShared)) {
    throw std::runtime_error(std::string(op) + ": the CUDA backend takes images of at most 3072 x 3072 windows that no border cuts");
  }
  const PatchScratch scratch(plan, workspace);

  const PatchImages queries{reinterpret_cast<const unsigned char*>(args.query),
                            Pixel::float32,
                            {0, args.query_height * args.query_width, args.query_width, 1},
                            static_cast<int>(args.query_height),
                            static_cast<int>(args.query_width)};
  patch_launch(op, patch_planes_kernel, {queries, g, plan.query_rows, plan.query_columns, 1, scratch.query},
               patch_blocks(static_cast<int64_t>(g.channels) * plan.query_rows * plan.query_columns), 0, stream);
  patch_launch(op, patch_samples_kernel, {g, plan.query_rows, plan.query_columns, scratch.query, plan.num_tiles, scratch.samples},
               patch_blocks(plan.samples), 0, stream);

  PatchFixed fixed{};
  if (plan.fixed) {
    const double unit = (args.lowres ? 1.0 : 2.0) * args.scale / 255.0;
    fixed.query = scratch.query;
    fixed.query_rows = plan.query_rows, fixed.query_columns = plan.query_columns;
    fixed.factor = 1.0 / unit;
    fixed.shift = args.lowres ? 0.0 : 0.5;
    fixed.unit = static_cast<float>(unit * unit);
    fixed.precision = scratch.precision;
    fixed.groups = plan.groups, fixed.steps = plan.steps;
    fixed.pairs = plan.pairs;
    fixed.limbs = scratch.limbs;
    fixed.squares = scratch.squares;
    fixed.layers = plan.layers, fixed.height = plan.height, fixed.width = plan.width;
    fixed.words = scratch.words;
    patch_launch(op, patch_precision_kernel, {fixed, g.channels}, 1, kPatchThreads * sizeof(double), stream);
    patch_launch(op, patch_limbs_kernel, {fixed, g}, patch_blocks(plan.pairs * plan.steps * 128), 0, stream);
    patch_launch(op, patch_squares_kernel, {fixed, g}, patch_blocks(plan.pairs * kPatchPair), 0, stream);
    task.fixed = &scratch.precision->fixed;
  }

  task.geometry = g;
  task.num_tiles = plan.num_tiles;
  task.rows = plan.rows, task.columns = plan.columns;
  task.planes = scratch.planes;
  task.samples = scratch.samples;
  task.query = scratch.query;
  task.query_rows = plan.query_rows, task.query_columns = plan.query_columns;
  task.longest_cut = plan.longest_cut;
  task.scale = static_cast<float>(args.scale);
  task.rate = static_cast<float>(args.inverse * 1.4426950408889634);
  const auto differences = patch_difference_kernel<Row>;
  const auto products = patch_fixed_kernel<Row>;
  patch_reserve(op, differences);
  patch_reserve(op, products);
  const auto cuts = patch_cut_kernel<Row>;
  patch_reserve(op, cuts);
  for (int64_t image = 0; image < args.num_images; image += plan.together) {
    task.num_images = std::min(plan.together, args.num_images - image);
    const int64_t bytes = args.pixel == Pixel::uint8 ? 1 : args.pixel == Pixel::float32 ? 4 : 2;
    PatchImages images{static_cast<const unsigned char*>(args.bank) + image * args.bank_strides[0] * bytes, args.pixel, {},
                       static_cast<int>(args.height), static_cast<int>(args.width)};
    std::copy(args.bank_strides, args.bank_strides + 4, images.strides);
    patch_launch(op, patch_planes_kernel, {images, g, plan.rows, plan.columns, task.num_images, scratch.planes},
                 patch_blocks(task.num_images * g.channels * plan.rows * plan.columns), 0, stream);
    if (plan.fixed) {
      patch_launch(op, patch_words_kernel,
                   {images, g.channels, plan.groups, plan.layers, plan.height, plan.width, task.num_images, scratch.words},
                   patch_blocks(task.num_images * plan.groups * plan.height * plan.width), 0, stream);
      fixed.parts = std::clamp(kPatchFixedBlocks / task.num_images, int64_t{1}, plan.pairs);
      task.tile_floats = kPatchPair * static_cast<int64_t>(g.rows.image_whole) * g.columns.image_whole;
      task.tiles = plan.fixed_shared ? nullptr : scratch.fixed_tiles;
      const int64_t shared = plan.table_bytes + (plan.fixed_shared ? task.tile_floats * static_cast<int64_t>(sizeof(float)) : 0);
      patch_launch(op, products, {task, fixed}, std::min(plan.fixed_blocks, task.num_images * fixed.parts),
                   static_cast<size_t>(shared), stream);
    }
    task.tile_floats = plan.tile_floats;
    task.tiles = plan.shared ? nullptr : scratch.tiles;
    patch_launch(op, differences, task, std::min(plan.blocks, task.num_images * plan.num_tiles),
                 plan.shared ? static_cast<size_t>(plan.tile_floats) * sizeof(float) : 0, stream);
    patch_launch(op, cuts, task, (task.num_images * patch_cut_windows(g) + kPatchWarps - 1) / kPatchWarps,
                 cut_shared, stream);
    task.minima += task.num_images, task.sums += task.num_images;
    if (task.tops != nullptr) task.tops += task.num_images;
    if (task.nearest != nullptr) task.nearest += task.num_images;
    if (task.pixels != nullptr) task.pixels += task.num_images;
  }
}

template <class Row>
void run_patches(const char* op, const PatchArgs& args, PatchTask task, void* workspace, cudaStream_t stream) {
  if (args.num_images == 0 || args.positions() == 0) return;
  task.positions = args.positions();
  task.stats_stride = args.stats_stride;
  each_slab(args, [&](const PatchArgs& slab) {
    run_slab<Row>(op, slab, task, workspace, stream);
    const int64_t done = slab.positions() * args.stats_stride;
    task.minima += done, task.sums += done;
    if (task.tops != nullptr) task.tops += done;
    if (task.nearest != nullptr) task.nearest += done;
    if (task.pixels != nullptr) task.pixels += done;
  });
}

}  // namespace pyattr::cuda
