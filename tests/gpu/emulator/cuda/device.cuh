// The emulator's version of csrc/cuda/device.cuh: same names, same meaning, checked.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace pyattr::cuda {

inline unsigned char* dynamic_shared() { return emulator::state.shared.data(); }

inline bool barrier_or(bool flag) {
  emulator::Meeting& block = emulator::state.block;
  block.flag |= flag;
  emulator::meet(block, static_cast<unsigned>(emulator::state.fibers.size()), [&] {
    block.flag_result = block.flag;
    block.flag = false;
  });
  return block.flag_result;
}
inline void barrier() { barrier_or(false); }

inline bool warp_barrier_and(bool flag) {
  emulator::Meeting& warp = emulator::warp();
  warp.flag |= !flag;
  emulator::meet(warp, emulator::kWarp, [&] {
    warp.flag_result = !warp.flag;
    warp.flag = false;
  });
  return warp.flag_result;
}
inline void warp_barrier() { warp_barrier_and(true); }

inline uint32_t shuffle_xor(uint32_t value, int mask) {
  emulator::Meeting& warp = emulator::warp();
  const unsigned lane = threadIdx.x % emulator::kWarp;
  warp.words[lane][0] = value;
  emulator::meet(warp, emulator::kWarp, [&] {
    for (unsigned i = 0; i < emulator::kWarp; ++i) warp.words[i][1] = warp.words[i ^ mask][0];
  });
  return warp.words[lane][1];
}

inline bool readable(const void* from, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(from);
  if (address % bytes != 0) emulator::fail("misaligned read of global memory");
  for (const auto& range : emulator::state.readable) {
    if (address >= range.first && address + bytes <= range.second) return true;
  }
  emulator::fail("read outside the inputs");
  return false;
}

template <size_t kBytes>
void copy_async(void* to, const void* from) {
  const unsigned char* begin = dynamic_shared();
  const unsigned char* target = static_cast<unsigned char*>(to);
  if (target < begin || target + kBytes > begin + emulator::state.shared.size()) emulator::fail("copy outside shared memory");
  if (static_cast<size_t>(target - begin) % kBytes != 0) emulator::fail("misaligned copy to shared memory");
  if (!readable(from, kBytes)) return;
  emulator::state.fibers[emulator::state.current].pending_copies.emplace_back([=] { std::memcpy(to, from, kBytes); });
}
inline void copy_async_16(void* to, const void* from) { copy_async<16>(to, from); }
inline void copy_async_4(void* to, const void* from) { copy_async<4>(to, from); }
inline void copy_async_wait_all() {
  auto& pending = emulator::state.fibers[emulator::state.current].pending_copies;
  for (const auto& copy : pending) copy();
  pending.clear();
}

template <class T>
T load_global(const void* address) {
  T value{};
  if (readable(address, sizeof(T))) std::memcpy(&value, address, sizeof(T));
  return value;
}

inline float bfloat16_value(uint32_t bits) {
  bits <<= 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float float16_value(uint32_t bits) {
  const double sign = bits & 0x8000u ? -1 : 1;
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return mantissa ? NAN : static_cast<float>(sign * INFINITY);
  return static_cast<float>(sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24)));
}
inline uint32_t half_to_float_bits(uint32_t half) {
  const float value = float16_value(half);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The fragments as the PTX manual's figures for mma.m16n8k16 give them; the sum of 17 terms is cut off toward zero at float32, the
// most a tensor core loses.
template <float (*value)(uint32_t)>
void mma_emulated(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Meeting& warp = emulator::warp();
  const unsigned lane = threadIdx.x % emulator::kWarp;
  uint32_t(&mine)[10] = warp.words[lane];
  std::memcpy(mine, a, sizeof a);
  mine[4] = b0, mine[5] = b1;
  std::memcpy(mine + 6, c, sizeof c);
  emulator::meet(warp, emulator::kWarp, [&] {
    float left[16][16], right[16][8];  // [row][k], [k][column]
    for (unsigned i = 0; i < emulator::kWarp; ++i) {
      const unsigned g = i / 4, t = i % 4;
      for (unsigned half = 0; half < 2; ++half) {
        for (unsigned r = 0; r < 4; ++r) left[g + 8 * (r % 2)][2 * t + half + 8 * (r / 2)] = value(warp.words[i][r] >> 16 * half & 0xFFFF);
        for (unsigned r = 0; r < 2; ++r) right[2 * t + half + 8 * r][g] = value(warp.words[i][4 + r] >> 16 * half & 0xFFFF);
      }
    }
    for (unsigned i = 0; i < emulator::kWarp; ++i) {
      for (unsigned r = 0; r < 4; ++r) {
        float start;
        std::memcpy(&start, &warp.words[i][6 + r], sizeof start);
        double sum = start;
        for (unsigned k = 0; k < 16; ++k) sum += static_cast<double>(left[i / 4 + 8 * (r / 2)][k]) * right[k][2 * (i % 4) + r % 2];
        float result = static_cast<float>(sum);
        if (std::fabs(static_cast<double>(result)) > std::fabs(sum)) result = std::nextafter(result, 0.0f);
        std::memcpy(&warp.words[i][6 + r], &result, sizeof result);
      }
    }
  });
  std::memcpy(c, mine + 6, sizeof c);
}

inline int32_t byte_of(uint32_t word, unsigned index) { return static_cast<int8_t>(word >> 8 * index & 0xFF); }

inline int32_t dot_bytes(uint32_t a, uint32_t b, int32_t sum) {
  for (unsigned i = 0; i < 4; ++i) sum += byte_of(a, i) * byte_of(b, i);
  return sum;
}

// The fragments as the PTX manual's figures for mma.m16n8k32 of 8-bit integers give them.
inline void mma_bytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Meeting& warp = emulator::warp();
  uint32_t(&mine)[10] = warp.words[threadIdx.x % emulator::kWarp];
  std::memcpy(mine, a, sizeof a);
  mine[4] = b0, mine[5] = b1;
  std::memcpy(mine + 6, c, sizeof c);
  emulator::meet(warp, emulator::kWarp, [&] {
    int32_t left[16][32], right[32][8];  // [row][k], [k][column]
    for (unsigned i = 0; i < emulator::kWarp; ++i) {
      const unsigned g = i / 4, t = i % 4;
      for (unsigned byte = 0; byte < 4; ++byte) {
        for (unsigned r = 0; r < 4; ++r) left[g + 8 * (r % 2)][4 * t + byte + 16 * (r / 2)] = byte_of(warp.words[i][r], byte);
        for (unsigned r = 0; r < 2; ++r) right[4 * t + byte + 16 * r][g] = byte_of(warp.words[i][4 + r], byte);
      }
    }
    for (unsigned i = 0; i < emulator::kWarp; ++i) {
      for (unsigned r = 0; r < 4; ++r) {
        for (unsigned k = 0; k < 32; ++k) warp.words[i][6 + r] += static_cast<uint32_t>(left[i / 4 + 8 * (r / 2)][k] * right[k][2 * (i % 4) + r % 2]);
      }
    }
  });
  std::memcpy(c, mine + 6, sizeof c);
}

struct BFloat16Operand {
  static constexpr uint32_t kMinusOnes = 0xBF80BF80u;
  static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_emulated<bfloat16_value>(c, a, b0, b1); }
};
struct Float16Operand {
  static constexpr uint32_t kMinusOnes = 0xBC00BC00u;
  static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_emulated<float16_value>(c, a, b0, b1); }
};

}  // namespace pyattr::cuda
