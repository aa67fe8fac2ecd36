// Philox4x32-10 for a run of calls, at the instruction set of the file that includes this.
//
// philox_calls(first, calls, c2, ...): words 0 and 1 (low[i]) and 2 and 3 (high[i]) of counter (first + i, 0, c2, 0). Writes
// whole vectors: low and high need room for calls rounded up to a multiple of 8. Internal linkage: each SIMD file has its own copy.
#pragma once

#include <cstdint>

#include "common/philox.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyattr::cpu {
namespace {

#if defined(__AVX512F__)

void philox_calls(uint32_t first, int64_t calls, uint32_t c2, uint32_t seed, uint32_t stream, uint64_t* low, uint64_t* high) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t i = 0; i < calls; i += 8) {
    __m512i x0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first) + i), lanes), x1 = _mm512_setzero_si512();
    __m512i x2 = _mm512_set1_epi64(c2), x3 = x1;
    uint32_t k0 = seed, k1 = stream;
    for (int r = 0; r < kPhiloxRounds; ++r, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      const __m512i p0 = _mm512_mul_epu32(x0, m0), p1 = _mm512_mul_epu32(x2, m1);
      x0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), x1, _mm512_set1_epi64(k0), 0x96);  // a ^ b ^ c
      x2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), x3, _mm512_set1_epi64(k1), 0x96);
      x1 = p1, x3 = p0;
    }
    _mm512_storeu_si512(low + i, _mm512_mask_blend_epi32(0xAAAA, x0, _mm512_slli_epi64(x1, 32)));
    _mm512_storeu_si512(high + i, _mm512_mask_blend_epi32(0xAAAA, x2, _mm512_slli_epi64(x3, 32)));
  }
}

#elif defined(__AVX2__)

// Each 32-bit word lives in a 64-bit lane, where vpmuludq reads and writes it without shuffles; what is left in a lane's upper
// half is never read.
void philox_calls(uint32_t first, int64_t calls, uint32_t c2, uint32_t seed, uint32_t stream, uint64_t* low, uint64_t* high) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  for (int64_t i = 0; i < calls; i += 8) {  // two vectors hide the multiplier's latency
    const __m256i base = _mm256_set1_epi64x(static_cast<int64_t>(first) + i);
    __m256i x0[2] = {_mm256_add_epi64(base, _mm256_setr_epi64x(0, 1, 2, 3)), _mm256_add_epi64(base, _mm256_setr_epi64x(4, 5, 6, 7))};
    __m256i x1[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    __m256i x2[2] = {_mm256_set1_epi64x(c2), _mm256_set1_epi64x(c2)}, x3[2] = {x1[0], x1[1]};
    uint32_t k0 = seed, k1 = stream;
    for (int r = 0; r < kPhiloxRounds; ++r, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      for (int v = 0; v < 2; ++v) {
        const __m256i p0 = _mm256_mul_epu32(x0[v], m0), p1 = _mm256_mul_epu32(x2[v], m1);
        x0[v] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(x1[v], _mm256_set1_epi64x(k0)));
        x2[v] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(x3[v], _mm256_set1_epi64x(k1)));
        x1[v] = p1, x3[v] = p0;
      }
    }
    for (int v = 0; v < 2; ++v) {
      const __m256i words01 = _mm256_blend_epi32(x0[v], _mm256_slli_epi64(x1[v], 32), 0b10101010);
      const __m256i words23 = _mm256_blend_epi32(x2[v], _mm256_slli_epi64(x3[v], 32), 0b10101010);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + i + 4 * v), words01);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + i + 4 * v), words23);
    }
  }
}

#else

void philox_calls(uint32_t first, int64_t calls, uint32_t c2, uint32_t seed, uint32_t stream, uint64_t* low, uint64_t* high) {
  for (int64_t i = 0; i < calls; ++i) {
    const PhiloxBlock x = philox4x32_10(first + static_cast<uint32_t>(i), 0, seed, stream, c2);
    low[i] = x.word[0] | static_cast<uint64_t>(x.word[1]) << 32;
    high[i] = x.word[2] | static_cast<uint64_t>(x.word[3]) << 32;
  }
}

#endif

}  // namespace
}  // namespace pyattr::cpu
