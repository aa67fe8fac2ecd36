// Vectors of one float for each image of a block, as the patch kernels of one SIMD level have them; internal linkage throughout.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/patch_plan.h"
#include "cpu/registers.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyattr::cpu {
namespace {

constexpr int64_t kLanes = kRegisterLanes;  // images of a block
using reg = register_t<kRegisterLanes>;
typedef int32_t ireg __attribute__((vector_size(4 * kRegisterLanes)));
typedef uint32_t ureg __attribute__((vector_size(4 * kRegisterLanes)));  // where bits may run over

inline reg multiply_add(reg a, reg b, reg c) {
#if defined(__AVX512F__)
  return (reg)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (reg)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < kRegisterLanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);  // the same bits, without the speed
  return c;
#endif
}

inline reg splat(float x) {
#if defined(__AVX512F__)
  return (reg)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (reg)_mm256_set1_ps(x);
#else
  return reg{x, x, x, x};
#endif
}
inline ireg splat(int32_t x) { return ireg{} + x; }

}  // namespace
}  // namespace pyattr::cpu
