// Enough of CUDA to run one thread block at a time on a CPU: every thread is a fiber that runs until it meets the others (at a
// barrier, a shuffle or a tensor-core product). Stands in for the toolkit's header of the same name; test use only.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1) : x(x_) {}
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 209, cudaErrorUnsupportedPtxVersion = 222 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

namespace emulator {

constexpr unsigned kWarp = 32;

struct Fiber {
  ucontext_t context;
  bool done = false;
  std::vector<std::function<void()>> pending_copies;  // cp.async: nothing arrives before it is waited for
};

// What 32 lanes, or a whole block, bring to a meeting point.
struct Meeting {
  unsigned arrived = 0, generation = 0;
  bool flag = false, flag_result = false;
  uint32_t words[kWarp][10];
};

struct State {
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  std::vector<unsigned char> shared;
  std::vector<Meeting> warps;
  Meeting block;
  ucontext_t scheduler;
  unsigned current = 0;
  // Set by the test.
  int shared_limit = 232448;
  bool reverse = false;  // order in which fibers are resumed
  std::vector<std::pair<uintptr_t, uintptr_t>> readable;  // begin and end of what kernels may read through load_global
  std::string error;
  int64_t launches = 0;
};
inline State state;

inline void fail(const std::string& message) {
  if (state.error.empty()) state.error = message;
}

inline void yield() { swapcontext(&state.fibers[state.current].context, &state.scheduler); }

// Wait for `count` fibers; the last to arrive runs `action` for all.
template <class Action>
void meet(Meeting& meeting, unsigned count, Action action) {
  const unsigned generation = meeting.generation;
  if (++meeting.arrived == count) {
    action();
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  while (meeting.generation == generation) yield();
}

inline Meeting& warp() { return state.warps[state.current / kWarp]; }

}  // namespace emulator

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulator::state.shared_limit, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

namespace emulator {
inline std::function<void()> body;
inline void enter() {
  body();
  state.fibers[state.current].done = true;
  yield();
}

inline void run_block(unsigned threads, size_t shared_bytes) {
  constexpr size_t kStack = 256 << 10;
  state.fibers.assign(threads, Fiber{});
  state.stacks.resize(threads * kStack);
  state.shared.assign(shared_bytes, 0xFF);  // what nobody wrote reads as NaN
  state.warps.assign((threads + kWarp - 1) / kWarp, Meeting{});
  state.block = Meeting{};
  for (unsigned i = 0; i < threads; ++i) {
    ucontext_t& context = state.fibers[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = state.stacks.data() + i * kStack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned fiber = state.reverse ? threads - 1 - i : i;
      if (state.fibers[fiber].done) continue;
      running = true;
      state.current = fiber;
      threadIdx.x = fiber;
      swapcontext(&state.scheduler, &state.fibers[fiber].context);
    }
  }
  for (const Fiber& fiber : state.fibers) {
    if (!fiber.pending_copies.empty()) fail("a thread ended with copies nobody waited for");
  }
}
}  // namespace emulator

template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  ++emulator::state.launches;
  if (shared > static_cast<size_t>(emulator::state.shared_limit)) emulator::fail("too much shared memory");
  gridDim = grid, blockDim = block;
  const Argument argument = *static_cast<Argument*>(arguments[0]);
  emulator::body = [=] { kernel(argument); };
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx.x = emulator::state.reverse ? grid.x - 1 - i : i;
    emulator::run_block(block.x, shared);
  }
  return cudaSuccess;
}
