#include "cpu/hadamard_project_body.h"

namespace pyattr::cpu {
void hadamard_tile_avx2(const HadamardTile& tile) { hadamard_tile(tile); }
}  // namespace pyattr::cpu
