#include "common/parallel.h"

#include <pthread.h>

#include <algorithm>

namespace pyattr {
namespace {
bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
}  // namespace

int usable_threads(int wanted) { return forked || registered != 0 ? 1 : std::max(wanted, 1); }

}  // namespace pyattr
