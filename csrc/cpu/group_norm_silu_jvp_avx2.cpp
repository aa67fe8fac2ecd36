#include "cpu/group_norm_silu_jvp_body.h"

namespace pyattr::cpu {
void group_norm_task_avx2(const GroupNormTask& task) { group_norm_task(task); }
}  // namespace pyattr::cpu
