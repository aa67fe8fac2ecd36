#include "cpu/patch_distances_body.h"

namespace pyattr::cpu {
void tile_distances_avx2(const PatchPlan& plan, const PatchTile& tile, const PatchBuffers& buffers) {
  tile_distances(plan, tile, buffers);
}
}  // namespace pyattr::cpu
