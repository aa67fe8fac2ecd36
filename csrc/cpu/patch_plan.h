// How the CPU kernels of the patch operations take a query: its padded planes, and tiles of its positions, each with the rectangle of
// the bank's positions that all of the tile may match. Plain data for the files of every SIMD level; filled in by patch_plan.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/patch_args.h"
#include "common/simd_level.h"

namespace pyattr::cpu {

// Along each axis the tile's positions [first, first + count) match [bank_first, bank_first + bank_count), or, where `alike`, each
// matches only the same position of the bank, and bank_count is 1.
struct PatchAxis {
  int64_t first, count, bank_first, bank_count;
  bool alike;
};

struct PatchTile {
  PatchAxis row, column;
};

struct PatchPlan {
  const PatchArgs* args;
  const float* query;                        // [C, query_rows, query_columns], padded; block sums where lowres
  const float* query_norms;                  // [query_rows, query_columns], squares summed over channels
  int64_t query_rows, query_columns;
  int64_t bank_rows, bank_columns;           // the same of a bank image's planes
  int64_t padding, bank_width;               // zeros on each side; W'
  int64_t side, dilation;                    // of the box filter
  const PatchTile* tiles;
  int64_t num_tiles;
  // The most that any tile needs of a thread's scratch, in vectors of one float for each image; matches are of one position.
  int64_t distances, squares, boxes, rows, strip, matches;
  int64_t row_stride;                        // of `rows`
};

constexpr int64_t kPatchStrip = 32;  // vectors of a row that go down the rows together where boxes are large

// A thread's scratch: arrays of one float for each image of a block.
struct PatchBuffers {
  float* images;     // [C][bank_rows][bank_columns]
  float* norms;      // [bank_rows][bank_columns], squares summed over channels
  float* squares;    // of a pair of rows
  float* boxes;      // the same
  float* rows;       // [rows + margin][row_stride]
  float* strip;      // [rows + margin][kPatchStrip], or one line of boxes
  float* distances;  // [rows][columns][bank rows][bank columns] of a tile
};

using TileDistances = void (*)(const PatchPlan& plan, const PatchTile& tile, const PatchBuffers& buffers);

// Blocks of images for one thread: the next ones are fetched from *next until num_blocks, some together, since neighbours write to
// the same cache lines.
struct PatchWork {
  const PatchPlan* plan;
  TileDistances distances;  // of the same SIMD level
  int64_t* next;
  int64_t num_blocks, together;
};

// The plan with what it points to.
class PatchSchedule {
 public:
  PatchSchedule(const PatchArgs& args, int64_t lanes);
  const PatchPlan& plan() const { return plan_; }

 private:
  std::vector<float> query_, norms_;
  std::vector<PatchTile> tiles_;
  PatchPlan plan_;
};

// x, and the one NaN for all of them: what is computed from it and from other numbers then ends in zeros, as the weights need it.
static inline float plain_nan(float x) { return x == x ? x : std::numeric_limits<float>::quiet_NaN(); }

// Images in a block at this level: the floats of a register.
int64_t patch_lanes(SimdLevel level);

TileDistances patch_distances(SimdLevel level);

// Calls kernel(PatchWork) on every thread until all blocks are done.
template <typename Kernel>
void for_patch_blocks(const PatchArgs& args, int num_threads, Kernel kernel) {
  const SimdLevel level = simd_level();
  const int64_t lanes = patch_lanes(level), blocks = (args.num_images + lanes - 1) / lanes;
  if (blocks == 0 || args.positions() == 0) return;
  const PatchSchedule schedule(args, lanes);
  int64_t next = 0;
  const int threads = static_cast<int>(std::min<int64_t>(usable_threads(num_threads), blocks));
  const int64_t together = std::clamp<int64_t>(blocks / (8 * threads), 1, 4);
  parallel_for(threads, threads, [&](int64_t) { kernel({&schedule.plan(), patch_distances(level), &next, blocks, together}); });
}

}  // namespace pyattr::cpu
