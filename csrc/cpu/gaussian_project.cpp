#include "gaussian_project.h"

#include "common/simd_level.h"
#include "cpu/gaussian_project_body.h"

namespace pyattr::cpu {

#if defined(PYATTR_X86)
void gaussian_tile_avx2(const ProjectTile& tile);
void gaussian_tile_avx512(const ProjectTile& tile);
#endif

void gaussian_project(const ProjectArgs& args, int num_threads) {
  TileKernel kernel = project_tile;
#if defined(PYATTR_X86)
  if (simd_level() == SimdLevel::avx2) kernel = gaussian_tile_avx2;
  if (simd_level() == SimdLevel::avx512) kernel = gaussian_tile_avx512;
#endif
  project(args, num_threads, kernel);
}

}  // namespace pyattr::cpu
