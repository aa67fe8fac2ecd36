#include "rademacher_project.h"

#include "common/simd_level.h"
#include "cpu/rademacher_project_body.h"

namespace pyattr::cpu {

#if defined(PYATTR_X86)
void rademacher_tile_avx2(const ProjectTile& tile);
void rademacher_tile_avx512(const ProjectTile& tile);
#endif

void rademacher_project(const ProjectArgs& args, int num_threads) {
  TileKernel kernel = project_tile;
#if defined(PYATTR_X86)
  if (simd_level() == SimdLevel::avx2) kernel = rademacher_tile_avx2;
  if (simd_level() == SimdLevel::avx512) kernel = rademacher_tile_avx512;
#endif
  project(args, num_threads, kernel);
}

}  // namespace pyattr::cpu
