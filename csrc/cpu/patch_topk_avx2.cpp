#include "cpu/patch_topk_body.h"

namespace pyattr::cpu {
void topk_blocks_avx2(const PatchWork& work) { topk_blocks(work); }
}  // namespace pyattr::cpu
