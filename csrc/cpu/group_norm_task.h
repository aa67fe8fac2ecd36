// What a thread of group_norm_silu_jvp computes: some groups of one sample, for some tangents.
#pragma once

#include "group_norm_silu_jvp.h"

namespace pyattr::cpu {

struct GroupNormTask {
  const GroupNormSiluJvpArgs* args;
  int64_t sample;
  int64_t group_begin, group_end;
  int64_t tangent_begin, tangent_end;
  bool primal;      // whether y and sum are written too
  bool past_cache;  // how y_dot is written
};

using GroupNormKernel = void (*)(const GroupNormTask&);

}  // namespace pyattr::cpu
