#include "cpu/patch_mean_body.h"

namespace pyattr::cpu {
void mean_blocks_avx512(const PatchWork& work) { mean_blocks(work); }
}  // namespace pyattr::cpu
