// Scratch for a kernel. Internal linkage throughout: std::vector's functions, compiled in an AVX-512 file, could be the copy that the
// linker keeps for everybody.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

namespace pyattr::cpu {
namespace {

struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Aligned = std::unique_ptr<T[], AlignedFree>;

template <typename T>
Aligned<T> aligned_array(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes);
  if (p == nullptr) throw std::bad_alloc();
  return Aligned<T>(static_cast<T*>(p));
}

}  // namespace
}  // namespace pyattr::cpu
