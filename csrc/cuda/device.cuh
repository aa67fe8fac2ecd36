// The few things the kernels need from the hardware that C++ does not name. Everything else in this folder is plain C++, so
// a test can replace this one header and run the kernels' own source on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pyattr::cuda {

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char shared[];
  return shared;
}

// Barrier over the block; true if any thread passed true.
__device__ __forceinline__ bool barrier_or(bool flag) { return __syncthreads_or(flag) != 0; }
__device__ __forceinline__ void barrier() { __syncthreads(); }

// Barrier over the warp; true if every lane passed true.
__device__ __forceinline__ bool warp_barrier_and(bool flag) {
  __syncwarp();
  return __all_sync(0xFFFFFFFFu, flag) != 0;
}
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// Asynchronous copies from global to shared memory: both addresses aligned to the size.
__device__ __forceinline__ void copy_async_16(void* to, const void* from) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async_4(void* to, const void* from) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

template <class T>
__device__ __forceinline__ T load_global(const void* address) {
  return *static_cast<const T*>(address);
}

__device__ __forceinline__ uint32_t half_to_float_bits(uint32_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(half)));
  return __float_as_uint(value);
}

// c += a * b on tensor cores: a 16 x 16, b 16 x 8, c 16 x 8 in float32. With g = lane / 4 and t = lane % 4,
//   a[0] = rows g,   k 2t, 2t+1       a[2] = rows g,   k 2t+8, 2t+9      (low half of a register = lower k)
//   a[1] = rows g+8, k 2t, 2t+1       a[3] = rows g+8, k 2t+8, 2t+9
//   b0   = k 2t, 2t+1, column g       b1   = k 2t+8, 2t+9, column g
//   c[0], c[1] = row g, columns 2t, 2t+1;  c[2], c[3] = row g+8.
struct BFloat16Operand {
  static constexpr uint32_t kMinusOnes = 0xBF80BF80u;
  __device__ __forceinline__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};
struct Float16Operand {
  static constexpr uint32_t kMinusOnes = 0xBC00BC00u;
  __device__ __forceinline__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// c += a * b of signed bytes on tensor cores, exact: a 16 x 32, b 32 x 8, c 16 x 8 in int32. A register of a or b holds four
// consecutive k, the lowest in its lowest byte; c lies as above.
//   a[0] = row g, k 4t to 4t+3;  a[1] = row g+8;  a[2], a[3] = the same rows, k 16 higher;  b0, b1 = column g, k 4t, k 4t+16
__device__ __forceinline__ void mma_bytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum + the products of four pairs of signed bytes.
__device__ __forceinline__ int32_t dot_bytes(uint32_t a, uint32_t b, int32_t sum) {
  return __dp4a(static_cast<int32_t>(a), static_cast<int32_t>(b), sum);
}

}  // namespace pyattr::cuda
