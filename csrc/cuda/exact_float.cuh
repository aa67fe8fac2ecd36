// Float32 operations that round once and are never contracted into one another, the same bits on a GPU and on a CPU (built
// with -ffp-contract=off), and the bits of a float.
#pragma once

#include <cmath>
#include <cstring>

#include "common/philox.h"

namespace pyattr::cuda {

PYATTR_HOST_DEVICE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

PYATTR_HOST_DEVICE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

PYATTR_HOST_DEVICE float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

PYATTR_HOST_DEVICE float square_root(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

PYATTR_HOST_DEVICE uint32_t bits_of(float a) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(a);
#else
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
#endif
}

PYATTR_HOST_DEVICE float float_of(uint32_t a) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(a);
#else
  float value;
  std::memcpy(&value, &a, sizeof value);
  return value;
#endif
}

}  // namespace pyattr::cuda
