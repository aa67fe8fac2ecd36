#include "cpu/gaussian_project_body.h"

namespace pyattr::cpu {
void gaussian_tile_avx512(const ProjectTile& tile) { project_tile(tile); }
}  // namespace pyattr::cpu
