// How the CPU kernels of the patch operations take a query: its padded planes, and tiles of its positions, each with the rectangle of
// the bank's positions that all of the tile may match. Plain data for the files of every SIMD level; filled in by patch_plan.cpp.
#pragma once

#include <cstdint>
#include <vector>

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
  int64_t query_rows, query_columns;
  int64_t bank_rows, bank_columns;           // the same of a bank image's planes
  int64_t side, dilation;                    // of the box filter
  const PatchTile* tiles;
  int64_t num_tiles;
  // The most that any tile needs, in vectors of one float for each image.
  int64_t distances, products, rows, strips, matches;
};

// Blocks of images for one thread: the next is fetched from *next until num_blocks.
struct PatchWork {
  const PatchPlan* plan;
  int64_t* next;
  int64_t num_blocks;
};

// The plan with what it points to.
class PatchSchedule {
 public:
  PatchSchedule(const PatchArgs& args, int64_t lanes);
  const PatchPlan& plan() const { return plan_; }

 private:
  std::vector<float> query_;
  std::vector<PatchTile> tiles_;
  PatchPlan plan_;
};

// Images in a block at this level: the floats of a register.
int64_t patch_lanes(SimdLevel level);

}  // namespace pyattr::cpu
