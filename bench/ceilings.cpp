// What this machine can do at most: float32 adds and fused multiply-adds per second on every thread at once, and bytes per
// second read from memory. Compiled for the machine it runs on and run once per benchmark run; prints one JSON object.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <omp.h>
#include <vector>

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kChains = 12;  // independent chains: more than latency (4) x pipes (2), fewer than the registers
typedef float Lanes __attribute__((vector_size(kWidth * sizeof(float))));

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// One step per lane and chain, kept from being folded by an empty asm that claims to change the registers.
template <bool fused>
static double steps_per_second(double seconds) {
  double total = 0;
#pragma omp parallel reduction(+ : total)
  {
    Lanes sum[kChains] = {}, factor = {}, term = {};
    for (int lane = 0; lane < kWidth; ++lane) factor[lane] = 0.999f, term[lane] = 1e-3f;
    int64_t steps = 0;
#pragma omp barrier
    const double start = now();
    double elapsed = 0;
    do {
      for (int repeat = 0; repeat < 20000; ++repeat) {
        for (int chain = 0; chain < kChains; ++chain) {
          sum[chain] = fused ? sum[chain] * factor + term : sum[chain] + term;
#if defined(__x86_64__)
          asm volatile("" : "+x"(sum[chain]));
#else
          asm volatile("" : "+w"(sum[chain]));
#endif
        }
      }
      steps += int64_t{20000} * kChains * kWidth;
      elapsed = now() - start;
    } while (elapsed < seconds);
    total += steps / elapsed;
  }
  return total;
}

static double read_bytes_per_second(size_t bytes, int rounds) {
  std::vector<uint64_t> buffer(bytes / sizeof(uint64_t), 1);
  const int64_t count = buffer.size();
  double best = 0;
  uint64_t checksum = 0;
  for (int round = 0; round < rounds; ++round) {
    const double start = now();
    uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum) schedule(static)
    for (int64_t i = 0; i < count; ++i) sum += buffer[i];
    const double rate = bytes / (now() - start);
    if (rate > best) best = rate;
    checksum += sum;
  }
  return checksum == uint64_t(count) * rounds ? best : 0;
}

int main() {
  double adds = 0, fmas = 0;
  for (int round = 0; round < 4; ++round) {
    adds = std::max(adds, steps_per_second<false>(0.2));
    fmas = std::max(fmas, steps_per_second<true>(0.2));
  }
  const double bytes = read_bytes_per_second(size_t{1} << 29, 5);
  std::printf("{\"threads\": %d, \"adds_per_s\": %.4g, \"fmas_per_s\": %.4g, \"ram_read_bytes_per_s\": %.4g}\n",
              omp_get_max_threads(), adds, fmas, bytes);
}
