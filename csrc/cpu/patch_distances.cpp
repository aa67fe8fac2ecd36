#include "cpu/patch_distances_body.h"

namespace pyattr::cpu {

#if defined(PYATTR_X86)
void tile_distances_avx2(const PatchPlan& plan, const PatchTile& tile, const PatchBuffers& buffers);
void tile_distances_avx512(const PatchPlan& plan, const PatchTile& tile, const PatchBuffers& buffers);
#endif

TileDistances patch_distances(SimdLevel level) {
#if defined(PYATTR_X86)
  if (level == SimdLevel::avx2) return tile_distances_avx2;
  if (level == SimdLevel::avx512) return tile_distances_avx512;
#endif
  static_cast<void>(level);
  return tile_distances;
}

}  // namespace pyattr::cpu
