// Fresh memory in large pages: one fault for 2 MB instead of 512. Internal linkage throughout.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyattr::cpu {
namespace {

constexpr uintptr_t kHugePage = 2 << 20;

// A hint about memory that is about to be written from end to end; where the system does not take it, nothing is lost.
// Measured on a virtual machine's Zen 3: writing 64 MB for the first time 1.6 GB/s without, 4 to 8 GB/s with it.
inline void expect_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (bytes > 0 && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace pyattr::cpu
