#include "cpu/attention_jvp_body.h"

namespace pyattr::cpu {
const AttentionKernels& attention_kernels_avx512() {
  static constexpr AttentionKernels kernels = kAttentionKernels;
  return kernels;
}
}  // namespace pyattr::cpu
