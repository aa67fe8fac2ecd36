// W floats as one register, or as several where W is wider than the machine's: an array of registers keeps the compiler from
// lowering a too wide vector through memory. Internal linkage: the types differ between SIMD files.
#pragma once

#include <type_traits>

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
