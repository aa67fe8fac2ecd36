#include "cpu/rademacher_project_body.h"

namespace pyattr::cpu {
void rademacher_tile_avx2(const ProjectTile& tile) { project_tile(tile); }
}  // namespace pyattr::cpu
