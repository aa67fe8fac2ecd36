// W floats as one register, or as several where W is wider than the machine's: an array of registers keeps the compiler from
// lowering a too wide vector through memory. Internal linkage: the types differ between SIMD files.
#pragma once

#include <cmath>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyattr::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kRegisterLanes = 16;
#elif defined(__AVX2__)
constexpr int kRegisterLanes = 8;
#else
constexpr int kRegisterLanes = 4;
#endif

template <int N>
struct Register {
  typedef float type __attribute__((vector_size(4 * N)));
};
template <>
struct Register<1> {
  using type = float;
};
template <int W>
using register_t = typename Register<(W < kRegisterLanes ? W : kRegisterLanes)>::type;
template <int W>
constexpr int kRegisters = W < kRegisterLanes ? 1 : W / kRegisterLanes;

// Whole registers: a * b + c, rounded once, and x in every lane.
using whole_register_t = register_t<kRegisterLanes>;
inline whole_register_t multiply_add(whole_register_t a, whole_register_t b, whole_register_t c) {
#if defined(__AVX512F__)
  return (whole_register_t)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (whole_register_t)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < kRegisterLanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);  // the same bits, without the speed
  return c;
#endif
}
inline whole_register_t splat(float x) {
#if defined(__AVX512F__)
  return (whole_register_t)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (whole_register_t)_mm256_set1_ps(x);
#else
  return whole_register_t{x, x, x, x};
#endif
}

// Emits nothing; the compiler computes `value` here, after the last such line and before the next, knowing nothing of it.
template <typename T>
inline void in_this_order(T& value) {
#if defined(__x86_64__) && defined(__GNUC__)
  if constexpr (std::is_integral_v<T>) {
    asm volatile("" : "+r"(value));
  } else {
    asm volatile("" : "+x"(value));
  }
#else
  static_cast<void>(value);  // no other processor has been measured
#endif
}

}  // namespace
}  // namespace pyattr::cpu
