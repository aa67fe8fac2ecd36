// OpenMP loops that stay safe after fork().
#pragma once

#include <cstdint>
#include <exception>

namespace pyattr {

// Threads to use: `wanted`, but 1 in a process forked from this one, where GNU OpenMP's thread pool no longer exists and a
// parallel region of more than one thread would wait for it for ever.
int usable_threads(int wanted);

// Calls body(i) for i in [0, count) on up to num_threads threads. The first exception thrown is thrown again here.
template <typename Body>
void parallel_for(int64_t count, int num_threads, const Body& body) {
  const int threads = usable_threads(num_threads);
  std::exception_ptr error;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && count > 1)
  for (int64_t i = 0; i < count; ++i) {
    try {
      body(i);
    } catch (...) {
#pragma omp critical(pyattr_error)
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace pyattr
